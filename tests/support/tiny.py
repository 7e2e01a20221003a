"""Tiny models and a tiny tokenizer on disk, written by transformers itself, for every test that needs a base to serve.

    path = make_tiny_model("qwen3", tmp_path)                        # config, generation config, safetensors
    path = make_tiny_model("llama", tmp_path, num_hidden_layers=3)   # any field of the transformers config
    make_tiny_tokenizer(path)                                        # tokenizer and chat template beside it

Nothing is downloaded. Weights are random but of the size a trained model's have (see `randomise`), so that logits
differ by whole units between tokens and a wrong norm, head or position shows at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 320
"""256 bytes, the special tokens and some merges fit in."""

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (BOS, EOS, IM_START, IM_END)
"""Ids 0, 1, 2, 3."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# family: (transformers config class, model class, what differs from _COMMON)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": _LLAMA3_ROPE, "eos_token_id": [1, 3]}),
    "llama_biased": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "tinyllama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    ),
    "smollm2": (  # 9 query heads on 3 key heads, tied, as SmolLM2-135M
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": (  # 7 query heads on 1 key head, biases on q, k, v only
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (  # head_dim apart from hidden / heads, as Qwen3-0.6B
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 24,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
            "num_hidden_layers": 3,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 9, "num_key_value_heads": 4}),
    "phi4mini": (  # partial rotary and longrope with its switch at 24 tokens
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
                "original_max_position_embeddings": 24,
            },
        },
    ),
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The transformers config of a tiny model of `family`; `overrides` are fields of it."""
    import transformers

    config_class, _, fields = FAMILIES[family]
    return getattr(transformers, config_class)(**{**_COMMON, **fields, **overrides})


def tiny_hf_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model: fp32, eval mode, eager attention (the formulas written out, not a fused kernel)."""
    import transformers

    config = tiny_config(family, **overrides)
    config._attn_implementation = "eager"
    model = getattr(transformers, FAMILIES[family][1])(config).eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter a random value of a trained model's size, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * std

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                # Gemma's norms are stored as the distance from one, Llama's as they are: around their neutral value
                weight.copy_(weight.new_full((), float(weight.float().mean().round())) + draw(weight, 0.3))
            elif name.endswith(".bias"):
                weight.copy_(draw(weight, 0.5))
            else:  # [out, in]: outputs of unit size; the head and the table a bit more, for decided logits
                gain = 2.0 if "embed" in name or "lm_head" in name else 1.0
                weight.copy_(draw(weight, gain * weight.shape[-1] ** -0.5))


def make_tiny_model(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of FAMILIES) as a checkpoint into the folder `path`; returns `path`.

    `generation` sets fields of generation_config.json; `overrides` are fields of the transformers config, such as
    num_hidden_layers=3. Load the oracle back with `load_oracle(path)`.
    """
    model = tiny_hf_model(family, seed=seed, **overrides).to(dtype)
    for field, value in (generation or {}).items():
        setattr(model.generation_config, field, value)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def load_oracle(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model of a checkpoint, eager attention, eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=dtype).eval()


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and the other one sits there in the rain, "
    "then they both go in to rest; an answer is an answer, and the end is the end of it all. "
) * 4


def make_tiny_tokenizer(path: Path) -> Path:
    """Write a fast byte-level BPE tokenizer with a chat template into `path`: any text round-trips, ids < VOCAB_SIZE.

    encode() puts BOS in front (as Llama's does), the chat template writes its own. EOS is id 1, BOS 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[IM_START, IM_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    path.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(path)
    return path
