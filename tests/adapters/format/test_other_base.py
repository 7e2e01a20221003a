"""What an adapter's config tells of another base, by names that are on the Hub."""

from __future__ import annotations

import pytest

from loraplex.adapters.format.other_base import remark_on_base

NAMES = {  # name: what it says, and formats that it goes with
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": ("bitsandbytes", ("nf4", "fp4")),
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": ("bitsandbytes", ("nf4",)),
    "/home/me/models/gemma-2-2b-it-bnb-4bit/": ("bitsandbytes", ("nf4",)),
    "hugging-quants/Meta-Llama-3.1-8B-BNB-NF4": ("bitsandbytes", ("nf4",)),
    "TheBloke/Mistral-7B-v0.1-GPTQ": ("GPTQ", ("gptq",)),
    "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4": ("GPTQ", ("gptq",)),
    "Qwen/Qwen2.5-7B-Instruct-AWQ": ("AWQ", ("awq",)),
    "Qwen/Qwen3-8B-FP8": ("fp8", ("fp8",)),
    "RedHatAI/Llama-3.2-1B-Instruct-quantized.w8a8": ("compressed-tensors", ("w8a8",)),
    "RedHatAI/Qwen2.5-7B-quantized.w4a16": ("compressed-tensors", ("w4a16",)),
    "bartowski/Llama-3.2-3B-Instruct-GGUF": ("GGUF", ("Q4_K + Q6_K", "Q8_0")),
    "org/model-Q4_K_M": ("GGUF", ("Q4_K + Q6_K",)),
    "org/model-int8": ("8 bits", ("int8",)),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_quantised_bases(name: str) -> None:
    said, formats = NAMES[name]
    for served in ("", "nf4" if said != "bitsandbytes" else "gptq"):
        remark = remark_on_base(name, served)
        assert said in remark
        assert (served or "not quantised") in remark
    for served in formats:
        assert remark_on_base(name, served) == ""


@pytest.mark.parametrize("formats", ["", "nf4", "Q4_K + Q6_K"])
@pytest.mark.parametrize(
    "name",
    [None, "", "meta-llama/Llama-3.2-1B-Instruct", "HuggingFaceTB/SmolLM2-135M", "fawqa/bagptq", "a-gptq/plain", "/"],
)
def test_other_names_say_nothing(name: str | None, formats: str) -> None:
    """An adapter of the original may be served on its quantised weights."""
    assert remark_on_base(name, formats) == ""


def test_long_names_are_cut() -> None:
    assert len(remark_on_base("x" * 5000 + "-GPTQ", "")) < 300
