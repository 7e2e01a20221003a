"""Adapters that were made for a base in another format than the one that is served, as far as its name tells."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loraplex.adapters.format.config import shown


@dataclass(frozen=True)
class _Kind:
    """How the names of bases in some formats end or go on, as "Llama-3.2-1B-Instruct-bnb-4bit"."""

    pattern: re.Pattern[str]
    says: str
    formats: tuple[str, ...]  # WeightFormat.name of its weights, or how it begins


def _kind(pattern: str, says: str, *formats: str) -> _Kind:
    return _Kind(re.compile(rf"(?:^|[-_.]){pattern}(?:[-_.]|$)", re.IGNORECASE), says, formats)


_KINDS = (
    _kind(r"gptq\w*", "GPTQ", "gptq"),
    _kind(r"awq\w*", "AWQ", "awq"),
    _kind(r"fp8\w*", "fp8", "fp8"),
    _kind(r"(?:quantized[-_.])?(w[48]a(?:8|16))", "compressed-tensors", "w"),
    _kind(r"gguf|i?q[2-8]_(?:[01]|k(?:_[sml])?)", "GGUF", "Q"),
    _kind(r"(?:bnb[-_.]?8bit|int8|8bit)", "8 bits", "int8"),
    _kind(r"(?:(?:unsloth[-_.])?bnb[-_.]?4bit|nf4|fp4|4bit)", "4 bits of bitsandbytes", "nf4", "fp4"),
)


def remark_on_base(named: str | None, formats: str) -> str:
    """Say that an adapter whose config names the base `named` was made for one in other formats than `formats`.

    formats: of the served base's quantised weights, as "Q4_1 + Q8_0"; "": it has none. Nothing is said of an adapter
    that was made on the original and is served on its quantised weights.
    """
    if not named:
        return ""
    last = named.rstrip("/").rpartition("/")[2]
    for kind in _KINDS:
        if kind.pattern.search(last):
            if any(served.startswith(kind.formats) for served in formats.split(" + ")):
                return ""
            return (
                f"its config names the base {shown(named)}, which is in {kind.says}, and this one is "
                f"{f'in {formats}' if formats else 'not quantised'}: answers may differ from those it was made for"
            )
    return ""
