"""What stands in front of the prompt: broken files refused by name, rows as the file has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loraplex.adapters.image.front_pages import front_rows
from loraplex.adapters.tiers.loader import Reading
from loraplex.adapters.tiers.reader import AdapterReader
from tests.support.adapter_folder import AdapterFolder
from tests.support.peft_adapters import layout_of, make_peft_adapter, served_base_of
from tests.support.tiny import tiny_hf_model

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 5
KINDS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": {"num_virtual_tokens": TOKENS},
    "P_TUNING": {"num_virtual_tokens": TOKENS, "encoder_hidden_size": 8},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": TOKENS, "num_tasks": 2, "num_ranks": 2, "task_id": 1},
    "CPT": {"cpt_token_ids": [3, 4, 5, 6, 7], "cpt_mask": [1] * TOKENS, "cpt_tokens_type_mask": [1, 2, 2, 3, 3]},
    "PREFIX_TUNING": {"num_virtual_tokens": TOKENS},
    "CARTRIDGE": {"num_virtual_tokens": TOKENS},
}
STORED = ("PREFIX_TUNING", "CARTRIDGE")


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_hf_model("llama")


class Folder(AdapterFolder):
    """An adapter of a kind on the tiny Llama, made by PEFT."""

    def __init__(self, base: Any, path: Path, kind: str) -> None:
        make_peft_adapter(base, path, kind=kind, strength=None, **KINDS[kind])
        super().__init__(path, lambda dtype: served_base_of(base, layout_of(base, dtype=dtype)))
        self.config = json.loads((path / "adapter_config.json").read_text())
        self.tensors = safetensors.torch.load(self.weights.read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files(base: Any, tmp_path: Path, kind: str) -> None:
    """Each tensor in turn: gone, of another shape, of another type, not finite; one more; then cut short."""
    folder = Folder(base, tmp_path, kind)
    sound = dict(folder.tensors)
    for name, tensor in sound.items():
        folder.tensors = {other: t for other, t in sound.items() if other != name} | {"x": torch.ones(1)}
        folder.refused("unmatched_tensor", "x is in the file")
        folder.tensors = {other: t for other, t in sound.items() if other != name}
        if folder.tensors:
            folder.refused("missing_tensor", re.escape(name))
        for wrong in (torch.cat((tensor, tensor)), tensor[..., :-1].contiguous(), tensor[0]):
            folder.tensors = {**sound, name: wrong}
            folder.refused("shape_mismatch", re.escape(f"{name} has shape"))
        folder.tensors = {**sound, name: torch.zeros_like(tensor, dtype=torch.int32)}
        folder.refused("bad_file", re.escape(name), "I32|int32")
        bad = tensor.clone()
        bad.view(-1)[-1] = float("nan")
        folder.tensors = {**sound, name: bad}
        folder.refused("not_finite", re.escape(name), "1 values")
    folder.tensors = {**sound, "prompt_embeddings": torch.full_like(sound["prompt_embeddings"], 1e30)}
    folder.refused("not_finite", "prompt_embeddings", "float16", dtype=torch.float16)
    folder.tensors = sound
    folder.write()
    folder.weights.write_bytes(folder.weights.read_bytes()[:-3])
    folder.refused("bad_file", write=False)


@pytest.mark.parametrize(
    ("kind", "key", "value", "code"),
    [
        *((kind, "num_virtual_tokens", value, "bad_config") for kind in KINDS for value in (0, -1, 5.0, "5", True)),
        *((kind, "num_virtual_tokens", (1 << 17) + 1, "too_large") for kind in KINDS),
        *((kind, "num_virtual_tokens", TOKENS + 1, "shape_mismatch") for kind in KINDS),
        *((kind, "num_transformer_submodules", 2, "unsupported_option") for kind in KINDS),
        *((kind, "modules_to_save", ["lm_head"], "unsupported_option") for kind in KINDS),
        *((kind, "an_option_of_next_year", True, "unsupported_option") for kind in KINDS),
        *((kind, "num_layers", value, "bad_config") for kind in KINDS for value in (0, "2")),
        *((kind, "num_layers", 3, "shape_mismatch") for kind in STORED),
        *((kind, "token_dim", 7, "shape_mismatch") for kind in STORED),
        *((kind, "num_attention_heads", 5, "bad_config") for kind in STORED),
        ("MULTITASK_PROMPT_TUNING", "task_id", None, "needs_setting"),
        *(("MULTITASK_PROMPT_TUNING", "task_id", value, "bad_config") for value in (2, -1, "1", True)),
        ("MULTITASK_PROMPT_TUNING", "num_tasks", 3, "shape_mismatch"),
        ("MULTITASK_PROMPT_TUNING", "num_tasks", 0, "bad_config"),
        ("MULTITASK_PROMPT_TUNING", "num_ranks", 3, "shape_mismatch"),
        ("MULTITASK_PROMPT_TUNING", "num_ranks", "2", "bad_config"),
    ],
)
def test_options(base: Any, tmp_path: Path, kind: str, key: str, value: Any, code: str) -> None:
    folder = Folder(base, tmp_path, kind)
    folder.config[key] = value
    counted = code == "shape_mismatch" and key in ("num_virtual_tokens", "num_ranks", "num_tasks")
    folder.refused(code, "prompt_embeddings|prefix_task_cols" if counted else key)


def test_a_prefix_of_another_base(base: Any, tmp_path: Path) -> None:
    other = tiny_hf_model("llama", num_hidden_layers=3)
    folder = Folder(other, tmp_path, "PREFIX_TUNING")
    folder.served = lambda dtype: served_base_of(base, layout_of(base, dtype=dtype))
    folder.refused("shape_mismatch", "num_layers is 3, expected 2")
    for key in ("num_layers", "token_dim", "num_attention_heads"):
        del folder.config[key]
    folder.refused("shape_mismatch", "prompt_embeddings has shape")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_the_file_says(base: Any, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In pages shorter than a row, too: any stretch of rows is found again, rounded once."""
    folder = Folder(base, tmp_path, kind)
    layout = layout_of(base, dtype=dtype, page_bytes=192)
    content = AdapterReader(served_base_of(base, layout), 1 << 20).read(Reading(str(tmp_path), True, lambda: None))
    wanted = folder.tensors["prompt_embeddings"].float()
    if "prefix_task_cols" in folder.tensors:
        wanted = wanted * (folder.tensors["prefix_task_cols"][1] @ folder.tensors["prefix_task_rows"][1])
    front, pages = content.info.front, list(content.image.pages)
    assert front is not None
    assert (front.tokens, front.stored, front.width) == (TOKENS, kind in STORED, wanted.shape[1])
    assert (content.info.rank, content.info.targets, content.info.num_tiles) == (0, (), 0)
    assert content.info.nbytes == -(-wanted.numel() * dtype.itemsize // 64) * 64
    assert f"{TOKENS} virtual tokens" in content.info.remark
    for first in range(TOKENS):
        for end in range(first + 1, TOKENS + 1):
            assert torch.equal(front_rows(pages, dtype, front.width, first, end), wanted[first:end].to(dtype))
