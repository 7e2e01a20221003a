"""What POST /load_lora_adapter_from_tensors carries: an adapter's config as an object, its weights as text.

SGLang's own clients pickle the weights, and unpickling is running what a client sent. Here the text is the base64 of a
safetensors file, which holds numbers and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import json
from binascii import Error as NotBase64

from loraplex.adapters.errors import AdapterExists
from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.adapters.sources.spool import SpooledAdapter
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.dialects.sglang_schemas import SglangTensorsRequest
from loraplex.server.api.encodings import too_large
from loraplex.server.api.errors import InvalidField, UnsupportedField
from loraplex.server.api.manage import check_may_pin, push_owner
from loraplex.server.api.push import check_pushed_name, enter, receiving
from loraplex.server.api.services import Services
from loraplex.server.catalog.saved import LoadTerms

FORMAT = "safetensors"

PICKLED_FORMATS = ("flattened_bucket",)
"""SGLang's `load_format` of a pickled tensor with all weights in it."""

TEXT = "serialized_tensors"


async def load_tensors(services: Services, record: SglangTensorsRequest) -> AdapterVersion:
    """Check all of the adapter in `record` and give it its name, which must be free, as SGLang's must.

    Raises ApiError, AdapterError, RateLimited, Overloaded, StateNotKept; nothing of it is left then.
    """
    check_may_pin(record.pinned)
    text = _check_fields(record)
    check_pushed_name(services, record.lora_name)
    services.drain.check()
    pushed, owner = services.pushed, push_owner()
    config = json.dumps(record.config_dict).encode()
    with receiving(pushed, owner) as (spooled, most):
        loop = asyncio.get_running_loop()
        source = await loop.run_in_executor(pushed.threads, _write, spooled, config, text, most)
    try:
        return await enter(
            services, source, owner, record.lora_name, LoadTerms(), replace=False, pinned=bool(record.pinned)
        )
    except AdapterExists:  # its own words name the folder of the one that is there
        raise InvalidField(
            "lora_name", f"lora_name: there is a {record.lora_name!r} already; unload it first", "adapter_exists"
        ) from None


def _check_fields(record: SglangTensorsRequest) -> str:
    """Return the text of the weights. Raises ApiError (400)."""
    if record.load_format in PICKLED_FORMATS:
        raise _pickled("load_format", f"found {record.load_format!r}, which is pickled")
    if record.load_format not in (None, FORMAT):
        raise InvalidField(
            "load_format", f"load_format: found {record.load_format[:40]!r}, expected {FORMAT!r} or null"
        )
    if record.added_tokens_config:
        raise UnsupportedField(
            "added_tokens_config",
            "added_tokens_config: tokens that an adapter adds come with its folder's tokenizer; load it from there",
        )
    texts = [text for text in (record.serialized_tensors, *(record.serialized_named_tensors or ())) if text]
    if not record.config_dict or len(texts) != 1:
        raise InvalidField(
            "config_dict" if texts else TEXT,
            f"found {'a' if record.config_dict else 'no'} config_dict and {len(texts)} texts of weights; expected "
            f"adapter_config.json's object in config_dict and one text in {TEXT}, as there is one rank",
            "incomplete_upload",
        )
    return texts[0]


def _write(spooled: SpooledAdapter, config: bytes, text: str, most: int) -> str:
    """Return the source of the whole adapter, of `most` bytes at most. Raises ApiError (400, 413), NoRoom."""
    try:
        weights = base64.b64decode(text.encode("ascii"), validate=True)
    except (NotBase64, UnicodeEncodeError):
        raise InvalidField(TEXT, f"{TEXT}: it is no base64", "invalid_encoding") from None
    if _is_pickle(weights):
        raise _pickled(TEXT, "found a pickle")
    size = len(config) + len(weights)
    if size > most:
        raise too_large(f"{size} bytes", most, "of this adapter")
    spooled.write(CONFIG_FILE, config)
    spooled.write(WEIGHTS_FILE, weights)
    return spooled.finish()


def _is_pickle(data: bytes) -> bool:
    """Whether it begins as pickle (protocols 2 to 5) or torch.save (a zip); a safetensors file has a "{" at 8."""
    return data[8:9] != b"{" and (
        data[:4] == b"PK\x03\x04" or (data[:1] == b"\x80" and 2 <= (data[1:2] or b"\0")[0] <= 5)
    )


def _pickled(param: str, found: str) -> InvalidField:
    return InvalidField(
        param,
        f"{param}: {found}; unpickling runs what a client sent, so send the base64 of a safetensors file "
        f"(safetensors.torch.save) with load_format {FORMAT!r}",
        "pickled_tensors",
    )
