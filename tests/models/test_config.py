"""config.json of every family, old style and new; what cannot be served is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraplex.server.models.config import SUPPORTED, ModelConfig, Site, UnsupportedModel
from tests.support.tiny import FAMILIES, make_tiny_model, tiny_hf_model

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def write(folder: Path, fields: dict[str, Any], name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(fields))
    return folder


def llama(**fields: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL, **fields}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_the_checkpoints_linears(tmp_path: Path, family: str) -> None:
    """Names, shapes and biases of a layer's linears, as torch modules have them."""
    import torch

    config = ModelConfig.from_hf(make_tiny_model(family, tmp_path))
    layer = tiny_hf_model(family).model.layers[0]
    linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {p.name: ((p.out_features, p.in_features), p.has_bias) for p in config.projections()}
    assert found == {name: (tuple(m.weight.shape), m.bias is not None) for name, m in linears.items()}
    for site in (Site.QKV, Site.O, Site.GATE_UP, Site.DOWN):
        covered = 0
        for projection in config.projections():
            if projection.site == site:
                assert projection.out_start == covered
                covered += projection.out_features
        assert covered > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_projections_read_is_what_the_modules_are_given(tmp_path: Path, family: str) -> None:
    """The hidden state, as attention and MLP are given it, or a site's halves, one gating the other."""
    import torch

    config, model = ModelConfig.from_hf(make_tiny_model(family, tmp_path)), tiny_hf_model(family)
    layer, given, outputs = model.model.layers[0], {}, {}
    for name, module in layer.named_modules():

        def keep(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            given[name], outputs[name] = (*args, *kwargs.values())[0], output

        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    activation = {"silu": torch.nn.functional.silu, "gelu_tanh": torch.nn.GELU("tanh")}[config.activation]
    for projection in config.projections():
        block = projection.name.split(".")[0]
        assert projection.reads_hidden == torch.equal(given[projection.name], given[block])
        if projection.gated_by is not None:
            parts = [outputs[p.name] for p in config.projections() if p.site == projection.gated_by]
            gate, up = torch.cat(parts, -1).chunk(2, -1)
            torch.testing.assert_close(given[projection.name], activation(gate) * up)
    assert [p.name for p in config.projections() if p.gated_by is not None] == ["mlp.down_proj"]


def test_every_architecture_has_a_tiny_model() -> None:
    assert {model_class for _, model_class, _ in FAMILIES.values()} == set(SUPPORTED)


def test_old_and_new_style_are_one(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = llama(rope_theta=500000.0, rope_scaling={"type": "llama3", **scaling})
    new = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling})
    assert ModelConfig.from_hf(write(tmp_path, old)) == ModelConfig.from_hf(write(tmp_path, new))


def test_longropes_first_name(tmp_path: Path) -> None:
    """Phi-3-mini-128k's first config.json said "su"."""
    fields = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    phi = {**SMALL, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "original_max_position_embeddings": 32}
    su = ModelConfig.from_hf(write(tmp_path, {**phi, "rope_scaling": {"type": "su", **fields}}))
    longrope = ModelConfig.from_hf(write(tmp_path, {**phi, "rope_scaling": {"type": "longrope", **fields}}))
    assert su == longrope
    assert su.rope_switch == 32


def test_remote_code_is_not_needed(tmp_path: Path) -> None:
    """Phi's repositories carry code of their own; ours never runs it."""
    phi = {**SMALL, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 4}
    write(tmp_path, {**phi, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}})
    (tmp_path / "configuration_phi3.py").write_text("raise SystemExit('ran')")
    assert ModelConfig.from_hf(tmp_path).fused_checkpoint


def test_architecture_may_be_left_out(tmp_path: Path) -> None:
    fields = llama()
    del fields["architectures"]
    assert ModelConfig.from_hf(write(tmp_path, fields)).architecture == "LlamaForCausalLM"


def test_the_architecture_decides(tmp_path: Path) -> None:
    """Derivatives keep Llama's architecture under a model type of their own."""
    named = ModelConfig.from_hf(write(tmp_path, llama(model_type="vicuna")))
    assert named == ModelConfig.from_hf(write(tmp_path, llama()))


def test_llama_has_no_window(tmp_path: Path) -> None:
    assert ModelConfig.from_hf(write(tmp_path, llama(sliding_window=8))).windows == (None, None)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "mixture of experts": (
        {**SMALL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        ["MixtralForCausalLM", *SUPPORTED],
    ),
    "unheard of": ({"architectures": ["NewForCausalLM"], "model_type": "new"}, ["NewForCausalLM", *SUPPORTED]),
    "no architecture": ({"model_type": "bert"}, ["'bert'", *SUPPORTED]),
    "a classifier": (llama(architectures=["LlamaForSequenceClassification"]), ["LlamaForSequenceClassification"]),
    "images": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        ["Gemma3ForConditionalGeneration", "images", "Gemma3ForCausalLM"],
    ),
    "rope type": (
        llama(rope_scaling={"type": "spiral", "factor": 2.0}),
        ["'spiral'", "default, linear, dynamic, yarn, longrope, llama3"],
    ),
    "rope without its factor": (llama(rope_scaling={"type": "linear"}), ["factor"]),
    "partial rotary": (llama(partial_rotary_factor=0.5), ["partial_rotary_factor 0.5", "Phi3ForCausalLM"]),
    "activation": (llama(hidden_act="relu2"), ["'relu2'", "silu"]),
    "uneven heads": (llama(num_key_value_heads=3), ["4 query heads", "3 key-value heads"]),
    "wrong type": (llama(hidden_size="wide"), ["hidden_size"]),
    "longrope of another length": (
        {
            **SMALL,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7},
        },
        ["long_factor"],
    ),
    "an encoder": (
        {
            **SMALL,
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "head_dim": 16,
            "use_bidirectional_attention": True,
        },
        ["use_bidirectional_attention"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    fields, said = REFUSED[name]
    with pytest.raises(UnsupportedModel) as refusal:
        ModelConfig.from_hf(write(tmp_path, fields))
    message = str(refusal.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_no_config(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)
