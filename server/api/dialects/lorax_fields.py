"""LoRAX's parameters as this server's: fields, prompts and the headers that name them."""

from __future__ import annotations

from loraplex.server.api.chat_schemas import Message
from loraplex.server.api.conversation import Conversation, read_toolbox
from loraplex.server.api.dialects.lorax_schemas import (
    OTHER_NAMES,
    LoraxParameters,
    LoraxRequest,
)
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import UNSUPPORTED, check_unknown, ignored_header
from loraplex.server.api.prompts import Prompt, PromptSource
from loraplex.server.api.schemas import GenerationFields, SharedFields
from loraplex.server.api.services import Services
from loraplex.server.text.tokenizer import Tokenizer

_ADAPTER_FIELDS = ("adapter_id", "adapter_source", "merged_adapters", "api_token")
_SAME_FIELDS = ("frequency_penalty", "presence_penalty")

_OTHERS = UNSUPPORTED | {
    "model": ((), "name an adapter in adapter_id"),
    "adapters": ((), "use adapter_id, or merged_adapters"),
    "lora_path": ((), "use adapter_id"),
    "n": ((1,), "use best_of"),
    "logprobs": ((False, 0), "use details"),
    "top_logprobs": ((0,), "use return_k_alternatives"),
    "top_n_tokens": ((0,), "use return_k_alternatives"),
    "echo": ((False,), "use return_full_text"),
    "messages": ((), "use /v1/chat/completions"),
    "prompt": ((), "use inputs"),
    "stream": ((False,), "it stands beside parameters"),
}
"""Fields of other dialects that `parameters` does not have."""

_BESIDE = _OTHERS | dict.fromkeys({*LoraxParameters.model_fields, *OTHER_NAMES}, ((False,), "it stands in parameters"))
"""The same beside `parameters`, whose own are no fields there."""


def samples(params: LoraxParameters) -> bool:
    """A temperature of 1 does not make LoRAX sample by itself, one of 0 keeps it from it."""
    if params.temperature == 0:
        return False
    changes = params.temperature not in (None, 1.0) or params.top_k is not None
    return bool(params.do_sample or changes or min(params.top_p or 1.0, params.typical_p or 1.0) < 1)


def check_together(params: LoraxParameters, stream: bool) -> None:
    """What spans fields. Raises ApiError."""
    if params.adapter_id and params.merged_adapters is not None:
        raise InvalidField("adapter_id", "at most one of `adapter_id` or `merged_adapters` may be provided")
    if (params.best_of or 1) > 1:
        if stream:
            raise InvalidField("best_of", "`best_of` != 1 is not supported when streaming tokens")
        asked = (params.do_sample or None, params.temperature, params.top_k, params.top_p, params.typical_p)
        if all(value is None for value in asked):
            raise InvalidField("best_of", "you must use sampling when `best_of` is > 1")
        if params.seed is not None:
            raise InvalidField("seed", "`seed` must not be set when `best_of` > 1")
    if stream and params.decoder_input_details:
        raise InvalidField(
            "decoder_input_details", "`decoder_input_details` == true is not supported when streaming tokens"
        )


def neutral_fields(services: Services, params: LoraxParameters, seed: int | None, sampled: bool) -> GenerationFields:
    """LoRAX has no checkpoint's defaults: what is not given is neutral. Raises InvalidField."""
    worn = {name: getattr(params, name) for name in _ADAPTER_FIELDS}
    same = {name: getattr(params, name) for name in (*_SAME_FIELDS, *SharedFields.model_fields)}
    if same["include_stop_str_in_output"] is None:
        same["include_stop_str_in_output"] = True  # as LoRAX does
    if same["min_p"] is None:
        same["min_p"] = 0.0
    return GenerationFields(
        model=services.facts.names[0],
        **worn,
        **same,
        temperature=(1.0 if params.temperature is None else params.temperature) if sampled else 0.0,
        top_p=params.top_p or 1.0,
        top_k=params.top_k or 0,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty or 1.0,
        seed=seed,
        stop=tuple(params.stop or ()),
        ignore_eos=bool(params.ignore_eos_token),
    )


def prompt_source(services: Services, record: LoraxRequest, params: LoraxParameters) -> PromptSource:
    last = params.truncate
    said = [Message(role="user", content=record.inputs)] if params.apply_chat_template else []
    conversation = Conversation(said, read_toolbox(None, None, None, services.limits))

    def read(tokenizer: Tokenizer) -> list[Prompt]:
        ids = conversation.on(tokenizer).prompt().ids if said else tokenizer.encode(record.inputs)
        return [Prompt(ids[-last:] if last is not None else ids, text="")]

    return PromptSource("inputs", (len(record.inputs),), read)


def static_headers(services: Services, record: LoraxRequest, params: LoraxParameters) -> dict[str, str]:
    headers = {
        "x-compute-type": f"{services.facts.device}+optimized",
        "x-compute-characters": str(len(record.inputs)),
        "x-model-id": _printable(services.facts.names[0]),
    }
    worn = params.merged_adapters.ids if params.merged_adapters is not None else [params.adapter_id or ""]
    if any(worn):
        headers["x-adapter-id"] = _printable(",".join(worn))
        headers["x-adapter-source"] = params.adapter_source or "hub"
    names = check_unknown(record.model_extra or {}, _BESIDE)
    names += [f"parameters.{name}" for name in check_unknown(params.model_extra or {}, _OTHERS)]
    return headers | ignored_header(names)


def _printable(text: str) -> str:
    """Fit for a header."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:400])
