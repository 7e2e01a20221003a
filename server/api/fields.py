"""Fields of a request that this server does not have: most are ignored and named, some must be refused.

Ignoring a field is fine where the answer stays what was asked for. A field that would change the answer (a grammar, a
beam search, another way to name an adapter) is refused unless its value asks for nothing: answering 200 with something
else is the one thing worse than an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraplex.server.api.errors import UnsupportedField

IGNORED_HEADER = "x-ignored-fields"

_STRUCTURED = "use response_format"
_TOOLS = "use tools and tool_choice, which replaced it"
_BEAM = "only sampling and greedy decoding are supported"
_ADAPTER = "name the adapter in 'model' instead; GET /v1/models lists the names"
_TEXT_ONLY = "only text goes in and out"
_SAMPLER = "this way of sampling is not supported"
_PROMPT = "the prompt is taken as it is"
_BOTH = "completions and chats have it"
_REASONING = "the base has no such control"

# field: (values that ask for nothing, beside null and empty ones; why it is refused otherwise)
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    # structured output
    "structural_tag": ((), _STRUCTURED),
    "json_schema": ((), _STRUCTURED),
    "ebnf": ((), _STRUCTURED),
    # tools
    "functions": ((), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "web_search_options": ((), "the server itself searches nothing"),
    # another search
    "use_beam_search": ((False,), _BEAM),
    "num_beams": ((1,), _BEAM),
    "length_penalty": ((1,), _BEAM),
    "early_stopping": ((False,), _BEAM),
    "do_sample": ((True,), "use temperature 0 for greedy decoding"),
    # other samplers
    "top_a": ((0,), _SAMPLER),
    "tfs": ((1,), _SAMPLER),
    "tfs_z": ((1,), _SAMPLER),
    "epsilon_cutoff": ((0,), _SAMPLER),
    "eta_cutoff": ((0,), _SAMPLER),
    "mirostat": ((0,), _SAMPLER),
    "mirostat_mode": ((0,), _SAMPLER),
    "dynatemp_range": ((0,), _SAMPLER),
    "smoothing_factor": ((0,), _SAMPLER),
    "xtc_probability": ((0,), _SAMPLER),
    "dry_multiplier": ((0,), _SAMPLER),
    "no_repeat_ngram_size": ((0,), _SAMPLER),
    "penalty_alpha": ((0,), _SAMPLER),
    "watermark": ((False,), "only LoRAX's routes mark answers, by `parameters.watermark`"),
    "logits_processors": ((), _SAMPLER),
    "custom_logit_processor": ((), _SAMPLER),
    "vllm_xargs": ((), _SAMPLER),
    "bad_words": ((), _SAMPLER),
    "allowed_token_ids": ((), _SAMPLER),
    "stop_regex": ((), _SAMPLER),
    # what goes in
    "suffix": ((), "inserting before a suffix is not supported"),
    "prompt_embeds": ((), _TEXT_ONLY),
    "truncate": ((), _PROMPT),
    "truncate_prompt_tokens": ((), _PROMPT),
    "chat_template": ((), "the base's own chat template is used"),
    "continue_final_message": ((False,), "put the beginning of the answer into a prompt for /v1/completions"),
    "documents": ((), _PROMPT),
    "add_special_tokens": ((False,), "the chat template writes the special tokens"),  # completions have it
    # what comes out
    "prompt_logprobs": ((False,), _BOTH),
    "return_token_ids": ((False,), _BOTH),
    "return_tokens_as_token_ids": ((False,), "only completions have it"),
    "audio": ((), _TEXT_ONLY),
    "modalities": ((["text"],), _TEXT_ONLY),
    "mm_processor_kwargs": ((), _TEXT_ONLY),
    # reasoning models
    "verbosity": (("medium",), _REASONING),
    "thinking_token_budget": ((), _REASONING),
    # what other routes have
    "best_of": ((1,), "only completions have it"),
    "echo": ((False,), "only completions have it"),
    "tools": ((), "only chats have them"),
    "tool_choice": (("none", "auto"), "only chats have it"),
    # what LoRAX, TGI, SGLang, llama.cpp and transformers call what has another name here
    "max_new_tokens": ((), "use max_tokens"),
    "max_length": ((), "use max_tokens"),
    "n_predict": ((-1,), "use max_tokens"),
    "num_predict": ((-1,), "use max_tokens"),
    "min_new_tokens": ((0,), "use min_tokens"),
    "min_length": ((0,), "use min_tokens"),
    "num_return_sequences": ((1,), "use n"),
    "stop_sequences": ((), "use stop"),
    "eos_token_id": ((), "use stop_token_ids"),
    "ignore_eos_token": ((False,), "use ignore_eos"),
    "no_stop_trim": ((False,), "use include_stop_str_in_output"),
    "repeat_penalty": ((1,), "use repetition_penalty"),
    "sampling_seed": ((), "use seed"),
    "inputs": ((), "use prompt"),
    "parameters": ((), "its fields stand beside the others here"),
    "sampling_params": ((), "its fields stand beside the others here"),
    "options": ((), "its fields stand beside the others here"),
    "extra_body": ((), "its fields stand beside the others here"),
    "format": ((), _STRUCTURED),
    "return_full_text": ((False,), "use echo of completions"),
    "apply_chat_template": ((), "use /v1/chat/completions"),
    "decoder_input_details": ((False,), "completions give them with echo and logprobs"),
    "return_logprob": ((False,), "use logprobs"),
    "top_logprobs_num": ((0,), "use logprobs"),
    "top_n_tokens": ((0,), "use logprobs"),
    "n_probs": ((0,), "use logprobs"),
    "return_k_alternatives": ((0,), "use logprobs"),
    "details": ((False,), "use logprobs"),
    # other servers' and gateways' ways to name an adapter
    "adapter": ((), _ADAPTER),
    "adapter_name": ((), _ADAPTER),
    "lora": ((), _ADAPTER),
    "lora_adapter": ((), _ADAPTER),
    "lora_name": ((), _ADAPTER),
    "lora_request": ((), _ADAPTER),
}

ASKING_WHEN_EMPTY = frozenset({"web_search_options"})
"""Of these {} asks for something: OpenAI's reference has it search with all its defaults."""

MAX_NAMED = 32
"""Ignored fields named in the header; and characters of each: a header has to stay small and clean."""


def check_unknown(
    unknown: Mapping[str, Any], table: Mapping[str, tuple[tuple[Any, ...], str]] = UNSUPPORTED
) -> list[str]:
    """Names of the fields in `unknown` that are ignored. Raises UnsupportedField for the first that may not be."""
    ignored = []
    for name, value in unknown.items():
        neutral, reason = table.get(name, (None, ""))
        if neutral is None:
            ignored.append(name)
        elif not _asks_for_nothing(value, neutral) or (name in ASKING_WHEN_EMPTY and value is not None):
            raise UnsupportedField(name, f"{name!r} is not supported: {reason}. Leave it out to go on without.")
    return ignored


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The response header that names ignored fields; {} when there are none."""
    shown = ["".join(c if (c.isalnum() and c.isascii()) or c in "_-.[]" else "?" for c in n[:64]) for n in names]
    if not shown:
        return {}
    more = [f"and {len(shown) - MAX_NAMED} more"] if len(shown) > MAX_NAMED else []
    return {IGNORED_HEADER: ", ".join(shown[:MAX_NAMED] + more)}


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None or value in ("", [], {}):
        return True
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)  # 0 is False
