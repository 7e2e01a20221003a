"""What a request says of the adapters it wants: every field that may name one, as terms. Nothing is looked up."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.schemas import MAX_TERMS, MAX_WEIGHT, AdapterFields, MergedAdapters

LORAX_BASE = "__base_model__"
"""What LoRAX calls the base where it wants an adapter's id."""


_TERM = re.compile(r"(?P<name>[^*]+)(?:\*\s*(?P<weight>-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?))?")


@dataclass(frozen=True)
class Term:
    """Hold one adapter as the caller names it."""

    param: str  # the field that names it
    text: str
    weight: float = 1.0
    origin: str | None = None  # adapter_source, where the field may have one
    alias: str | None = None  # as the caller names it, where `text` is what an alias stands for

    @property
    def asked(self) -> str:
        """Return what the caller wrote."""
        return self.text if self.alias is None else self.alias


@dataclass(frozen=True)
class AdapterChoice:
    """Hold all that a request wants to wear, read but not looked up."""

    terms: tuple[Term, ...]
    merge: MergePlan | None = None  # the terms become one adapter by it


def strip_base(base_names: tuple[str, ...], text: str) -> str | None:
    """Return `text` without "base:"; None where it names the base itself."""
    if text in base_names or text == LORAX_BASE:
        return None
    for name in base_names:
        if text.startswith(f"{name}:"):
            return text[len(name) + 1 :]
    return text


def asks_for_base(record: AdapterFields) -> bool:
    """Tell whether `record` asks for the base by LoRAX's name of it, and not only for no adapter."""
    return LORAX_BASE in (record.model, record.adapter_id)


def read_wish(base_names: tuple[str, ...], record: AdapterFields) -> AdapterChoice:
    """Read what `record` asks for. Raises InvalidField where two fields ask for different things."""
    choices = [AdapterChoice(read_text(base_names, "model", record.model, record.adapter_source))]
    if record.adapters:
        choices.append(AdapterChoice(_read_terms(base_names, record)))
    if record.adapter_id not in (None, "", LORAX_BASE):
        choices.append(
            AdapterChoice(read_text(base_names, "adapter_id", record.adapter_id or "", record.adapter_source))
        )
    if record.merged_adapters is not None:
        choices.append(_read_merged(base_names, record.merged_adapters, record.adapter_source))
    if record.lora_path:
        choices.append(AdapterChoice(read_text(base_names, "lora_path", record.lora_path, None)))
    asked = [choice for choice in choices if choice.terms]
    for other in asked[1:]:
        if _same(asked[0]) != _same(other):
            first, second = asked[0].terms[0], other.terms[0]
            field = second.param.partition(".")[0].partition("[")[0]
            raise InvalidField(
                field,
                f"{field}: it names {show(second.text)!r}, but {first.param} names {show(first.text)!r} already; "
                "give one of them (several adapters together: adapters, or a mix in model)",
            )
    return asked[0] if asked else AdapterChoice(())


def _same(choice: AdapterChoice) -> object:
    return sorted((term.text, term.weight) for term in choice.terms), choice.merge


def read_text(base_names: tuple[str, ...], param: str, text: str, origin: str | None) -> tuple[Term, ...]:
    """Read a name, "base:name", "name@version" or a mix of them; () for the base."""
    if (
        origin is not None
        and text
        and text not in base_names
        and not any(text.startswith(f"{name}:") for name in base_names)
    ):
        return (Term(param, text, origin=origin),)  # a path may hold anything
    rest = strip_base(base_names, text)
    if rest is None or not text:
        return ()
    if "*" not in rest and "+" not in rest:
        return (Term(param, rest),)
    parts = [part.strip() for part in rest.split("+")]
    if len(parts) > MAX_TERMS:
        raise InvalidField(param, f"{param}: found a mix of {len(parts)} adapters, at most {MAX_TERMS} are possible")
    return tuple(_read_part(base_names, param, part, rest) for part in parts)


def _read_part(base_names: tuple[str, ...], param: str, part: str, whole: str) -> Term:
    found = _TERM.fullmatch(part)
    if found is None:
        raise InvalidField(
            param,
            f"{param}: {show(part)!r} is no part of a mix (in {show(whole)!r}); expected NAME or NAME*WEIGHT, joined "
            "by '+', as in sql*0.7+pirate*0.3",
        )
    weight = float(found["weight"] or 1.0)
    if not (math.isfinite(weight) and abs(weight) <= MAX_WEIGHT):
        raise InvalidField(param, f"{param}: the weight {found['weight']} is beyond {MAX_WEIGHT:g}")
    return _one(base_names, Term(param, found["name"].strip(), weight))


def _read_terms(base_names: tuple[str, ...], record: AdapterFields) -> tuple[Term, ...]:
    return tuple(
        _one(base_names, Term(f"adapters[{i}].name", given.name, given.weight))
        for i, given in enumerate(record.adapters or ())
    )


def _read_merged(base_names: tuple[str, ...], merged: MergedAdapters, origin: str | None) -> AdapterChoice:
    where = "merged_adapters"
    if len(merged.ids) != len(merged.weights):
        raise InvalidField(
            f"{where}.weights", f"{where}.weights: found {len(merged.weights)} weights for {len(merged.ids)} ids"
        )
    pairs = zip(merged.ids, merged.weights, strict=True)
    terms = tuple(
        _one(base_names, Term(f"{where}.ids[{i}]", name, weight, origin)) for i, (name, weight) in enumerate(pairs)
    )
    strategy = merged.merge_strategy or "linear"
    if strategy == "linear":
        return AdapterChoice(terms)
    if not merged.density:
        raise InvalidField(
            f"{where}.density", f"{where}.density: {strategy} keeps this share of the values; give it, more than 0"
        )
    plan = MergePlan(strategy, tuple(merged.weights), merged.density, merged.majority_sign_method or "total")
    return AdapterChoice(terms, plan)


def _one(base_names: tuple[str, ...], term: Term) -> Term:
    """Read one term of several. Raises InvalidField for the base, which is there anyhow."""
    rest = strip_base(base_names, term.text)
    if rest is None:
        raise InvalidField(
            term.param, f"{term.param}: {show(term.text)!r} is the base, which is always there in full; leave it out"
        )
    return replace(term, text=rest)


def show(text: str) -> str:
    """Cut what a caller wrote to what a message may hold of it."""
    return text if len(text) <= 200 else text[:200] + "..."
