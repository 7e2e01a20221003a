"""LoRA on the base's tables: which factors a file has for embed_tokens and lm_head, and which configs allow them.

....embed_tokens.lora_embedding_A [r, V], lora_embedding_B [hidden, r]    x += scaling * B A[:, id]
lm_head.lora_A.weight [r, hidden], lora_B.weight [V, r]                   logits += scaling * B A x

Both are served as the A [r, hidden] and B [V, r] of a linear from hidden state to tokens: the embedding's are the other
one's turned. Of a base whose head is its embedding PEFT saves both where the config ties them (ensure_weight_tying),
and otherwise changes the table that was targeted alone. V is the base's vocabulary, or a resized one's, whose rows
beyond the base's are in the file as well (outside.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.config import unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterModule, ServedBase
from loraplex.adapters.format.lora_config import LoraConfig
from loraplex.adapters.format.modules import PREFIX, FoundModule
from loraplex.adapters.format.outside import EMBED, HEAD, OwnTensor
from loraplex.adapters.format.outside_modules import MAX_ADDED
from loraplex.adapters.image.tiles import LowRank, table_layer, table_projection
from loraplex.kernels.constants import TableSite

TURNED_A, TURNED_B = "lora_embedding_A", "lora_embedding_B"
"""Roles of an embedding's factors, which are leaves of their names too."""


def find_tables(header: Mapping[str, TensorInfo], base: ServedBase, embed_path: str) -> list[FoundModule]:
    """List the tables as modules without tensors, as wide as the file's factors are; none beside a base without."""
    if base.outside is None:
        return []
    vocab, hidden, layer = base.outside.vocab, base.outside.hidden, table_layer(base.layout.num_layers)
    found = []
    for path, name, site, leaf, axis in (
        (embed_path, EMBED, TableSite.EMBED, f".{TURNED_A}", 1),
        (HEAD, HEAD, TableSite.HEAD, ".lora_B", 0),
    ):
        shapes = [info.shape for key, info in header.items() if key.startswith(f"{PREFIX}{path}{leaf}")]
        rows = shapes[0][axis] if shapes and len(shapes[0]) == 2 else vocab
        rows = rows if vocab < rows <= vocab + MAX_ADDED else vocab
        found.append(FoundModule(layer, table_projection(name, site, hidden, rows), path))
    return found


def check_tables(config: LoraConfig, targeted: Sequence[FoundModule]) -> None:
    """Raise AdapterRefused("unsupported_option") for an option that is not served on the tables that are targeted."""
    for key, found in (
        ("use_dora", config.dora),
        ("lora_bias", config.lora_bias),
        ("use_bdlora", config.blocks),
        ("alora_invocation_tokens", config.invoked_by),
        ("kasa_config" if config.start == "kasa" else "init_lora_weights", config.start),
    ):
        if found and targeted:
            raise unsupported(
                f"{key} is set and target_modules takes in {targeted[0].path}; on embed_tokens and lm_head plain LoRA "
                "is served: train without the option, or without the table"
            )


def table_part(module: AdapterModule, tensors: Mapping[str, Tensor], base: ServedBase) -> LowRank:
    """Make the part of a change of the embedding, in stream scale."""
    assert base.outside is not None, "find_tables() finds none without it"
    scale = base.outside.embed_scale
    rounded = 1.0 if scale is None else tensors[module.tensors[TURNED_A]].new_tensor(scale).to(base.layout.dtype).item()
    a, b = tensors[module.tensors[TURNED_B]].T, tensors[module.tensors[TURNED_A]].T
    return LowRank(module.layer, module.projection, a, b, module.scaling * rounded)


def check_resized(modules: Sequence[AdapterModule], own: Sequence[OwnTensor], base: ServedBase) -> None:
    """Raise AdapterRefused where the factors of a table and its rows in place of the base's do not go together."""
    for module in modules:
        if not module.is_table or base.outside is None:
            continue
        rows, name = module.projection.out_features, module.projection.name
        beside = [tensor for tensor in own if tensor.short == name]
        if any(tensor.ids is not None for tensor in beside):
            raise unsupported(
                f"trainable_token_indices names tokens of {name}, which target_modules takes in as well; train one of "
                "them"
            )
        if rows > base.outside.vocab and not any(tensor.shape[0] == rows for tensor in beside):
            raise AdapterRefused(
                "missing_tensor",
                f"the factors of {name} are of {rows} tokens and the base has {base.outside.vocab}; the file has no "
                f"{name} of {rows} rows (PEFT's save_embedding_layers=True saves it)",
            )
