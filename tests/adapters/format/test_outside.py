"""What an adapter's file has outside the base's linears: which files are refused, and what rows are left of others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.format.kinds import make_rows, parse_config, plan_adapter
from loraplex.adapters.format.outside import BaseOutside
from loraplex.adapters.format.outside_modules import MAX_ADDED
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.kernels.records import OwnPlaces, Projection
from tests.support.refusals import refused

VOCAB, HIDDEN, LAYERS = 20, 8, 2
PLACES = OwnPlaces(LAYERS)
EMBED = "base_model.model.model.embed_tokens"
HEAD = "base_model.model.lm_head"
NORM = "base_model.model.model.norm"
FIRST = "base_model.model.model.layers.0"
TABLE = torch.arange(VOCAB * HIDDEN, dtype=torch.float32).view(VOCAB, HIDDEN)
ONES = torch.ones(HIDDEN)


def _base(*, tied: bool = False, known: bool = True) -> ServedBase:
    projection = Projection("self_attn.q_proj", 0, HIDDEN, 0, HIDDEN, False)
    layout = BaseLayout("tiny", LAYERS, (projection,), 4096, torch.float32)

    def read(name: str) -> Tensor:
        return TABLE if name in ("model.embed_tokens.weight", "lm_head.weight") else ONES

    norms = ("input_layernorm", "", "post_attention_layernorm", "", "self_attn.q_norm", "")
    outside = BaseOutside(norms, VOCAB, HIDDEN, 4, tied, 2.0, False, read)

    def asked(*_: Any) -> Any:
        return None

    return ServedBase(layout, asked, asked, asked, asked, outside=outside if known else None)


def _plan(config: dict[str, Any], tensors: dict[str, Tensor], base: ServedBase) -> list[Any]:
    """Read a file of these tensors, beside the LoRA that a config of LoRA names; the rows that come of it."""
    if "peft_type" not in config:
        config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"], **config}
        for layer in range(LAYERS):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
            tensors = {f"{name}A.weight": torch.ones(1, HIDDEN), f"{name}B.weight": torch.ones(HIDDEN, 1), **tensors}
    header = {name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0) for name, tensor in tensors.items()}
    plan = plan_adapter(parse_config(json.dumps(config).encode()), header, base, lambda: None)
    return make_rows(plan, tensors, base, lambda: None)


def _low_rank(*, tokens: int = VOCAB) -> dict[str, Tensor]:
    """Factors of a LoRA on both tables, of rank 1."""
    return {
        f"{EMBED}.lora_embedding_A": torch.ones(1, tokens),
        f"{EMBED}.lora_embedding_B": torch.ones(HIDDEN, 1),
        f"{HEAD}.lora_A.weight": torch.ones(1, HIDDEN),
        f"{HEAD}.lora_B.weight": torch.ones(tokens, 1),
    }


BLOCKS = {"target_modules_bd_a": ["q_proj"], "nblocks": 2, "match_strict": False}
TABLES = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
LN = {"peft_type": "LN_TUNING", "target_modules": ["norm"]}
TOKENS = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 4]}
REFUSED: list[tuple[dict[str, Any], dict[str, Tensor], str, str]] = [
    ({"modules_to_save": ["q_proj"]}, {}, "unsupported_option", "q_proj"),
    ({"modules_to_save": ["score"]}, {}, "unsupported_option", "score"),
    ({"modules_to_save": ["k_norm"]}, {}, "unsupported_option", "k_norm"),
    ({"modules_to_save": ["q_norm"]}, {}, "missing_tensor", "q_norm"),
    ({"modules_to_save": 3}, {}, "bad_config", "modules_to_save"),
    ({"modules_to_save": ["model.norm"]}, {}, "missing_tensor", "model.norm"),
    ({}, {f"{NORM}.weight": ONES}, "unmatched_tensor", "model.norm.weight"),
    ({"modules_to_save": ["model.norm"]}, {f"{NORM}.weight": torch.ones(9)}, "shape_mismatch", r"\[9\]"),
    ({}, {f"{EMBED}.weight": TABLE[:-1]}, "shape_mismatch", "another base"),
    ({}, {f"{EMBED}.weight": torch.ones(VOCAB, 9)}, "shape_mismatch", "another base"),
    ({}, {f"{EMBED}.weight": torch.ones(VOCAB + MAX_ADDED + 1, 1)}, "too_large", "rows"),
    ({}, {f"{EMBED}.weight": torch.ones(VOCAB + 2, HIDDEN)}, "missing_tensor", "token 20.*lm_head"),
    ({}, {f"{EMBED}.weight": TABLE, f"{EMBED}.base_layer.weight": TABLE}, "unmatched_tensor", "twice"),
    ({"trainable_token_indices": [3, 3]}, {}, "bad_config", "twice"),
    ({"trainable_token_indices": [-1]}, {}, "bad_config", "ids of tokens"),
    ({"trainable_token_indices": {"score": [1]}}, {}, "unsupported_option", "score"),
    ({"trainable_token_indices": [VOCAB + MAX_ADDED]}, {}, "too_large", "names the token"),
    ({"trainable_token_indices": [3]}, {}, "missing_tensor", "embed_tokens"),
    (
        {"trainable_token_indices": [3]},
        {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(2, HIDDEN)},
        *("shape_mismatch", "trainable_tokens_delta"),
    ),
    ({}, {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)}, "unmatched_tensor", "no such"),
    (LN, {}, "missing_tensor", "model.norm"),
    (LN, {f"{NORM}.ln_tuning_layers.weight": ONES, f"{NORM}.more": ONES}, "unmatched_tensor", "norm.more"),
    (
        LN,
        {f"{NORM}.ln_tuning_layers.weight": ONES, f"{FIRST}.input_layernorm.ln_tuning_layers.weight": ONES},
        *("unmatched_tensor", "does not target"),
    ),
    ({**LN, "target_modules": ["ln_f"]}, {}, "bad_config", "ln_f"),
    ({**LN, "some_option": 1}, {}, "unsupported_option", "some_option"),
    (TOKENS, {}, "missing_tensor", "embed_tokens"),
    ({**TOKENS, "token_indices": []}, {}, "bad_config", "token_indices"),
    ({**TOKENS, "target_modules": ["q_proj"]}, {}, "unsupported_option", "q_proj"),
    ({"modules_to_save": ["model.norm"]}, {f"{NORM}.weight": ONES * float("nan")}, "not_finite", "model.norm"),
    (
        {"modules_to_save": ["model.norm"], "alora_invocation_tokens": [1]},
        {f"{NORM}.weight": 2 * ONES},
        *("unsupported_option", "alora_invocation_tokens"),
    ),
]


REFUSED += [
    (TABLES, {}, "missing_tensor", "embed_tokens.lora_embedding_A"),
    ({}, _low_rank(), "unmatched_tensor", "does not target this module"),
    (TABLES, {**_low_rank(), f"{HEAD}.lora_B.weight": torch.ones(VOCAB, 2)}, "shape_mismatch", "lora_B"),
    (TABLES, {**_low_rank(), f"{EMBED}.lora_embedding_B": torch.ones(9, 1)}, "shape_mismatch", "lora_embedding_B"),
    (TABLES, _low_rank(tokens=VOCAB - 1), "shape_mismatch", r"lora_embedding_A.*\[1, 19\]"),
    (TABLES, _low_rank(tokens=VOCAB + 2), "missing_tensor", "22 tokens and the base has 20"),
    (
        TABLES,
        {**_low_rank(), f"{EMBED}.base_layer.weight": TABLE + 1},
        "shape_mismatch",
        "not the base's: 20 of 20 rows",
    ),
    (
        {**TABLES, "trainable_token_indices": [3]},
        {**_low_rank(), f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(1, HIDDEN)},
        *("unsupported_option", "trainable_token_indices"),
    ),
    *(
        ({**TABLES, key: value}, _low_rank(), "unsupported_option", key)
        for key, value in (
            *(("use_dora", True), ("lora_bias", True), ("init_lora_weights", "pissa")),
            *(("alora_invocation_tokens", [1]), ("use_bdlora", BLOCKS)),
        )
    ),
]


@pytest.mark.parametrize(("config", "tensors", "code", "words"), REFUSED)
def test_what_is_refused(config: dict[str, Any], tensors: dict[str, Tensor], code: str, words: str) -> None:
    with refused(code, words):
        _plan(config, tensors, _base())


def test_a_base_of_which_nothing_else_is_known_refuses_by_name() -> None:
    for config in ({"modules_to_save": ["norm"]}, {"trainable_token_indices": [3]}, LN):
        with refused("unsupported_option"):
            _plan(config, {}, _base(known=False))


def test_rows_that_are_the_bases_own_are_left_out() -> None:
    """Of the embedding five rows in two runs differ, times the scale of the stream; of the head and a norm nothing."""
    changed = TABLE.clone()
    changed[[2, 3, 4, 17, 18]] += 1
    tensors = {f"{EMBED}.weight": changed, f"{HEAD}.weight": TABLE, f"{NORM}.weight": ONES}
    rows = _plan({"modules_to_save": ["embed_tokens", "lm_head", "model.norm"]}, tensors, _base())
    found = [(row.projection.site, row.projection.out_start, row.rows.tolist()) for row in rows]
    assert found == [
        (PLACES.embed, 2, (2 * changed[2:5]).tolist()),
        (PLACES.embed, 17, (2 * changed[17:19]).tolist()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_beside_a_low_rank_change_of_it_is_the_bases_own(dtype: torch.dtype) -> None:
    """As PEFT saves it, in whatever dtype: it takes nothing."""
    tensors = {**_low_rank(), f"{EMBED}.base_layer.weight": TABLE.to(dtype), f"{HEAD}.base_layer.weight": TABLE}
    assert _plan(TABLES, tensors, _base()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_what_acts_on_a_tied_head(tied: bool) -> None:
    """Trained tokens and a table that no option names do; modules_to_save does where the config ties it."""
    delta, whole = torch.full((2, HIDDEN), 0.5), TABLE + 1
    tokens = {f"{EMBED}.token_adapter.trainable_tokens_delta": delta}
    cases: list[tuple[dict[str, Any], dict[str, Tensor], bool]] = [
        ({"trainable_token_indices": [7, 3]}, tokens, True),
        ({}, {f"{EMBED}.weight": whole}, True),
        ({"modules_to_save": ["embed_tokens"]}, {f"{EMBED}.weight": whole}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {f"{EMBED}.weight": whole}, True),
    ]
    for config, tensors, acts in cases:
        places = {row.projection.site for row in _plan(config, tensors, _base(tied=tied))}
        assert places == {PLACES.embed, *([PLACES.head] if tied and acts else [])}
