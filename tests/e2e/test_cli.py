"""The command line: what it says when it is misused, how it starts, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loraplex.server import startup
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.command import cli
from loraplex.server.config import ServeConfig
from loraplex.server.config_adapters import NamedAdapter
from loraplex.server.options import ConfigError, parse_memory, parse_size
from tests.support.command import address, serving
from tests.support.live_server import Api
from tests.support.peft_adapters import make_peft_adapter
from tests.support.tiny import make_tiny_tokenizer
from tests.support.waiting import LIMIT


@pytest.fixture(scope="module")
def adapters(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good adapter, one for another base, and something that is none."""
    folder = tmp_path_factory.mktemp("adapters")
    make_peft_adapter(oracle, folder / "good", r=2, target_modules=["q_proj"])
    make_peft_adapter(oracle, folder / "damaged", r=2, target_modules=["q_proj"])
    file = folder / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    (folder / "notes").mkdir()
    return folder


# ------------------------------------------------------------------------------------------------------------ misuse


Run = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(startup, "prepare_environment", lambda environ: None)

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["loraplex", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def assert_one_line(result: tuple[Any, str, str], *words: str) -> None:
    code, out, err = result
    told = [line for line in err.splitlines() if not re.match(r"\d\d:\d\d:\d\d INFO ", line)]  # what went well before
    assert code == 2
    assert out == ""
    assert len(told) == 1, err
    assert told[0].startswith("loraplex: ")
    for word in words:
        assert word in told[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nope"], ["--nope"]),
        (["serv"], ["serv"]),
        (["serve"], ["BASE", "serve --help"]),
        (["serve", "x", "--nope"], ["--nope"]),
        (["serve", "x", "--port", "many"], ["--port"]),
        (["serve", "x", "--port", "70000"], ["--port"]),
        (["serve", "x", "--device", "tpu"], ["--device", "tpu"]),
        (["serve", "x", "--dtype", "int8"], ["--dtype"]),
        (["serve", "x", "--quantize", "int3"], ["--quantize", "int3"]),
        (["serve", "x", "--activations", "a4"], ["--activations", "a4"]),
        (["serve", "x", "--max-num-seqs", "0"], ["--max-num-seqs"]),
        (["serve", "x", "--max-model-len", "-5"], ["--max-model-len"]),
        (["serve", "x", "--memory", "4X"], ["--memory", "4X"]),
        (["serve", "x", "--memory", "0"], ["--memory"]),
        (["serve", "x", "--memory", "101%"], ["--memory", "101%"]),
        (["serve", "x", "--memory", "0.0"], ["--memory", "0.0"]),
        (["serve", "x", "--host-memory", "50%"], ["--host-memory", "50%"]),
        (["serve", "x", "--max-loras", "0"], ["--max-loras"]),
        (["serve", "x", "--adapter", "pirate"], ["--adapter", "NAME=PATH"]),
        (["serve", "x", "--adapter", "=path"], ["--adapter", "NAME=PATH"]),
        (["serve", "x", "--adapter", "x=p"], ["x=p", "base's"]),
        (["serve", "x", "--adapter", "a=p", "--adapter", "a=q"], ["a=q", "twice"]),
        (["serve", "x", "--adapter-dir", "/nowhere/at/all"], ["--adapter-dir", "/nowhere/at/all"]),
        (["serve", "/nowhere/at/all", "--port", "0"], ["/nowhere/at/all", "no folder"]),
        (["serve", "nowhere", "--port", "0"], ["'nowhere'", "demo"]),
        (["serve", __file__, "--port", "0"], ["no GGUF file", "folder"]),
        (["serve", "x", "--host", "no.such.host.invalid"], ["no.such.host.invalid"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_misuse_is_one_line(run_main: Run, arguments: list[str], words: list[str]) -> None:
    assert_one_line(run_main(*arguments), *words)


def test_a_port_in_use(run_main: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(run_main("serve", "x", "--port", port), port, "in use", "--port")


def test_a_state_of_another_server(run_main: Run, base: Path, tmp_path: Path) -> None:
    """It is refused before the base is loaded."""
    other = StateStore(tmp_path)
    start = ["serve", str(base), "--port", "0", "--state-dir", str(tmp_path)]
    assert_one_line(run_main(*start), f"--state-dir {tmp_path}", "another server")
    other.close()


def test_bases_that_cannot_be_served(run_main: Run, base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_one_line(run_main("serve", str(empty), "--port", "0"), str(empty), "config.json")
    (empty / "config.json").write_bytes((base / "config.json").read_bytes())
    assert_one_line(run_main("serve", str(empty), "--port", "0"), str(empty), "tokenizer")
    other = make_tiny_tokenizer(tmp_path / "other")
    assert_one_line(run_main("serve", str(other), "--port", "0"), "config.json")
    (other / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert_one_line(run_main("serve", str(other), "--port", "0"), "BertModel", "LlamaForCausalLM")
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    assert_one_line(run_main("serve", str(other), "--port", "0"), "safetensors")
    quantised = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (other / "config.json").write_text(json.dumps(quantised))
    assert_one_line(run_main("serve", str(other), "--port", "0"), "hqq", "gptq", "--quantize")


def test_a_context_longer_than_the_models(run_main: Run, base: Path) -> None:
    start = ["serve", str(base), "--port", "0", "--memory", "2G", "--device", "cpu"]
    assert_one_line(run_main(*start, "--max-model-len", "513"), "--max-model-len 513", "512")


def test_memory_and_device_that_are_not_there(run_main: Run, base: Path) -> None:
    import torch

    assert_one_line(run_main("serve", str(base), "--port", "0", "--memory", "1K"), "emory")
    if not torch.cuda.is_available():
        assert_one_line(run_main("serve", str(base), "--port", "0", "--device", "cuda"), "cuda")


def test_activations_of_a_base_that_is_not_quantised(run_main: Run, base: Path) -> None:
    start = ["serve", str(base), "--port", "0", "--memory", "2G", "--device", "cpu"]
    assert_one_line(run_main(*start, "--activations", "a8"), "--activations a8", "not quantised")


def test_named_adapters_that_cannot_be_served(run_main: Run, base: Path, adapters: Path) -> None:
    start = ["serve", str(base), "--port", "0", "--memory", "2G", "--device", "cpu"]
    assert_one_line(run_main(*start, "--adapter", "a=/nowhere/at/all"), "--adapter a=/nowhere/at/all")
    damaged = f"a={adapters / 'damaged'}"
    assert_one_line(run_main(*start, "--adapter", damaged), damaged, "adapter_model.safetensors")
    assert_one_line(run_main(*start, "--adapter", f"a b={adapters / 'good'}"), "a b")


def test_help_and_version_read_well_and_load_nothing_heavy() -> None:
    script = """
import sys
from loraplex.server.command.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
heavy = {"torch", "transformers", "fastapi", "numpy", "uvicorn", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    environ = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    shown = {}
    for arguments in (["--help"], ["serve", "--help"], ["version"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], env=environ, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        shown[arguments[0]] = done.stdout
    for flag in (
        *("--adapter", "--adapter-dir", "--served-model-name", "--chat-template", "--host", "--port", "--device"),
        *("--dtype", "--max-model-len", "--memory", "--host-memory", "--max-loras", "--max-num-seqs", "--token-budget"),
        *("--max-waiting", "--max-waiting-tokens", "--loader-threads", "NAME=PATH", "BASE", "--max-values"),
        *("--max-body", "--max-prompts", "--max-n", "--max-stops", "--max-logit-bias", "--max-tools", "--max-schema"),
        "--max-scores",
    ):
        assert flag in shown["serve"]
    assert "loraplex[otel]" in shown["serve"], "rich takes [otel] for a colour unless it is told otherwise"
    assert "serve" in shown["--help"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", shown["version"])


# ------------------------------------------------------------------------------------------------------------ serving


def run_curl(line: str) -> httpx.Response:
    """What the printed line does, without curl."""
    words = [word for word in shlex.split(line) if word != "-N"]
    assert words[0] == "curl"
    body = words[words.index("-d") + 1] if "-d" in words else None
    if body is None:
        return httpx.get(words[1], timeout=LIMIT)
    assert words[words.index("-H") + 1] == "Content-Type: application/json"
    return httpx.post(words[1], content=body, headers={"Content-Type": "application/json"}, timeout=LIMIT)


def test_serve_adapters_and_stop(base: Path, adapters: Path) -> None:
    mine = f"mine={adapters / 'good'}"
    with serving(str(base), "--adapter-dir", str(adapters), "--adapter", mine) as (process, lines):
        assert any("serves tiny and 2 adapters at http://127.0.0.1:" in line for line in lines)
        models, chat, adapted = (line for line in lines if line.startswith("curl"))
        assert {card["id"] for card in run_curl(models).json()["data"]} == {"tiny", "good", "mine"}
        answer = run_curl(chat)
        assert (answer.status_code, answer.json()["model"]) == (200, "tiny")
        answer = run_curl(adapted)
        assert (answer.status_code, answer.json()["model"]) == (200, "good")
        refused = Api(address(lines)).complete("damaged")
        assert refused.status_code == 400
        assert "adapter_model.safetensors" in refused.json()["error"]["message"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == 0
        assert "damaged" in err  # the log says what was left out
        assert "Traceback" not in err


def test_without_adapters_a_stream_is_shown(base: Path) -> None:
    with serving(str(base), "--served-model-name", "one", "--served-model-name", "two") as (_, lines):
        assert '"stream": true' in lines[-1]
        assert run_curl(lines[-1]).text.endswith("data: [DONE]\n\n")
        assert Api(address(lines)).names() == {"one", "two"}


# ------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("4G", 4 << 30), ("512M", 512 << 20), ("1.5k", 1536), ("2GiB", 2 << 30), ("3 MB", 3 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "memory"),
    [("0.5", 0.5), (".25", 0.25), ("1.0", 1.0), ("50%", 0.5), ("7.5 %", 0.075), ("1", 1), ("2G", 2 << 30)],
)
def test_memory_is_bytes_or_a_share(text: str, memory: float) -> None:
    assert parse_memory(text) == memory
    assert isinstance(parse_memory(text), type(memory))


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_size, text) for text in ("", "G", "-4G", "4X", "0", "0.0001K", "4G5", "1e9", "four")),
        *((parse_memory, text) for text in ("0.0", "0%", "100.1%", "-50%", "0.5%%", "half")),
    ],
)
def test_sizes_that_are_none(parse: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse(text)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ServeConfig("demo").base_names == ("demo",)
    assert ServeConfig("org/name").base_names == ("org/name",)
    for folder in ("./my-model/", str(tmp_path / "my-model")):
        assert ServeConfig(folder).base_names == ("my-model",)
    assert ServeConfig("./my-model", ("a", "b")).base_names == ("a", "b")
    assert NamedAdapter.parse("a=p=q") == NamedAdapter("a", "p=q")


def test_the_users_own_environment_is_kept() -> None:
    own = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "7"}
    environ = dict(own)
    startup.prepare_environment(environ)
    assert own.items() <= environ.items()
    fresh: dict[str, str] = {}
    startup.prepare_environment(fresh)
    assert fresh["OMP_WAIT_POLICY"] == "passive"
    assert 1 <= int(fresh["OMP_NUM_THREADS"]) <= (os.cpu_count() or 1)
