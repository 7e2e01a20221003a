"""What a request wears: every way to name an adapter, or several with weights, to leases. The one lookup there is.

    model            "" (the base), "sql", "base:sql", "sql@3fa9c1" (a version still known), "sql*0.7+pirate*0.3"
    adapters         [{"name": "sql", "weight": 0.7}, {"name": "pirate", "weight": 0.3}]
    adapter_id       LoRAX's, with an adapter_source an adapter not known here is loaded on first use
    merged_adapters  LoRAX's: linear is the same as `adapters`, the other strategies make an adapter of their own
    lora_path        SGLang's

Each value of each field is read alike: a name of the base, then "base:", "@" and the mix. Names that are registered
cannot hold ":", "@", "*" or "+", so no reading of a text hides another. Several adapters are computed in one launch,
each with its weight: exactly the sum, with nothing merged.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from loraplex.adapters.errors import AdapterNotFound
from loraplex.adapters.registry import AdapterLease
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.sources.sources import SourceAccess
from loraplex.server.api.errors import ApiError, InvalidField, UnsupportedField
from loraplex.server.api.manage import counting_adapters, permitted_source
from loraplex.server.api.schemas import MAX_TERMS, MAX_WEIGHT, AdapterFields, MergedAdapters
from loraplex.server.api.services import Services
from loraplex.server.catalog.on_demand import is_hidden, source_of
from loraplex.server.engine.request import Mix
from loraplex.server.tenancy.tenants import current_key
from loraplex.server.text.tokenizer import Tokenizer
from loraplex.server.text.tokenizers import TokenizersDiffer

HOW_TO_LIST = "GET /v1/models lists the names served here"

LORAX_BASE = "__base_model__"
"""What LoRAX calls the base where it wants an adapter's id."""


@dataclass(frozen=True)
class AdapterUse:
    """What one request wears, and how its texts are written then."""

    mix: Mix
    tokenizer: Tokenizer

    @property
    def tokens(self) -> int:
        """Return where the ids of tokens end that adapters have added; 0: none have."""
        return max((lease.version.info.tokens for lease, _ in self.mix), default=0)


_TERM = re.compile(r"(?P<name>[^*]+)(?:\*\s*(?P<weight>-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?))?")


@dataclass(frozen=True)
class Term:
    """One adapter as the caller names it."""

    param: str  # the field that names it
    text: str
    weight: float = 1.0
    origin: str | None = None  # adapter_source, where the field may have one


@dataclass(frozen=True)
class AdapterChoice:
    """All that a request wants to wear, read but not looked up."""

    terms: tuple[Term, ...]
    merge: MergePlan | None = None  # the terms become one adapter by it


@asynccontextmanager
async def leased(services: Services, record: AdapterFields) -> AsyncIterator[AdapterUse]:
    """The adapters `record` asks for, leased for the block; what they were loaded or merged for first is done by then.

    Raises ApiError (400; 404 for a name nobody has), AdapterError for one that cannot be loaded or merged, Overloaded
    where there is no room for it, or no more for this caller.
    """
    choice = read_wish(services.facts.names, record)
    if not choice.terms and not current_key().may_use_base:
        raise not_found(record.model)
    with ExitStack() as held:
        leases = [held.enter_context(await _lease(services, term, record.api_token)) for term in choice.terms]
        tokenizer = _tokenizer(services, choice, leases)
        if choice.merge is not None:
            with counting_adapters() as owner:
                leases = [held.enter_context(await services.on_demand.merge(leases, choice.merge, owner))]
        weights = (1.0,) if choice.merge is not None else tuple(term.weight for term in choice.terms)
        _check_fronts(choice, leases, weights)
        if choice.merge is None:
            _check_alone(choice, leases)
        yield AdapterUse(tuple(zip(leases, weights, strict=True)), tokenizer)


def _check_alone(choice: AdapterChoice, leases: Sequence[AdapterLease]) -> None:
    """Raises InvalidField where an adapter that has rows in place of the base's is in a mix, or weighted."""
    for term, lease in zip(choice.terms, leases, strict=True):
        if lease.version.info.alone and (len(leases) > 1 or term.weight != 1.0):
            param = term.param.partition(".")[0].partition("[")[0]
            raise InvalidField(
                param,
                f"{param}: the adapter {_show(term.text)!r} has {lease.version.info.alone} of its own in place of the "
                "base's, which cannot be added to another's; ask for it alone, with weight 1",
            )


def tokenizer_of(services: Services, model: str) -> Tokenizer:
    """How texts for `model` are written. Raises ApiError (404) unless it could be worn now."""
    choice = AdapterChoice(_read_text(services.facts.names, "model", model, None))
    if not choice.terms and not current_key().may_use_base:
        raise not_found(model)
    with ExitStack() as held:
        return _tokenizer(services, choice, [held.enter_context(_find(services, term)) for term in choice.terms])


def _check_fronts(choice: AdapterChoice, leases: Sequence[AdapterLease], weights: Sequence[float]) -> None:
    """Raises InvalidField where what stands in front of a prompt is weighted, or would be there twice."""
    fronts = [i for i, lease in enumerate(leases) if lease.version.info.front is not None]
    if not fronts or (len(fronts) == 1 and weights[fronts[0]] == 1.0):
        return
    param = choice.terms[0].param.partition(".")[0].partition("[")[0]
    names = ", ".join(repr(leases[i].version.name) for i in fronts)
    found = f"{len(fronts)} of them" if len(fronts) > 1 else f"weight {weights[fronts[0]]:g}"
    raise InvalidField(
        param,
        f"{param}: {names} puts virtual tokens in front of the prompt; found {found}, expected one such adapter of a "
        "request, with weight 1, beside any number of others",
    )


def _tokenizer(services: Services, choice: AdapterChoice, leases: Sequence[AdapterLease]) -> Tokenizer:
    """Raises InvalidField where the adapters of a mix write texts differently."""
    try:
        return services.tokenizers.of([lease.version.info.tokenizer for lease in leases])
    except TokenizersDiffer as error:
        param = choice.terms[0].param.partition(".")[0].partition("[")[0]
        raise InvalidField(param, f"{param}: {error}") from None


def strip_base(base_names: tuple[str, ...], text: str) -> str | None:
    """`text` without "base:"; None where it names the base itself."""
    if text in base_names:
        return None
    for name in base_names:
        if text.startswith(f"{name}:"):
            return text[len(name) + 1 :]
    return text


def read_wish(base_names: tuple[str, ...], record: AdapterFields) -> AdapterChoice:
    """What `record` asks for. Raises InvalidField where two fields ask for different things."""
    choices = [AdapterChoice(_read_text(base_names, "model", record.model, record.adapter_source))]
    if record.adapters:
        choices.append(AdapterChoice(_read_terms(base_names, record)))
    if record.adapter_id not in (None, "", LORAX_BASE):
        choices.append(
            AdapterChoice(_read_text(base_names, "adapter_id", record.adapter_id or "", record.adapter_source))
        )
    if record.merged_adapters is not None:
        choices.append(_read_merged(base_names, record.merged_adapters, record.adapter_source))
    if record.lora_path:
        choices.append(AdapterChoice(_read_text(base_names, "lora_path", record.lora_path, None)))
    asked = [choice for choice in choices if choice.terms]
    for other in asked[1:]:
        if _same(asked[0]) != _same(other):
            first, second = asked[0].terms[0], other.terms[0]
            field = second.param.partition(".")[0].partition("[")[0]
            raise InvalidField(
                field,
                f"{field}: it names {_show(second.text)!r}, but {first.param} names {_show(first.text)!r} already; "
                "give one of them (several adapters together: adapters, or a mix in model)",
            )
    return asked[0] if asked else AdapterChoice(())


def not_found(model: str, param: str = "model") -> ApiError:
    """The answer for a name that is not there, or not for this caller: they cannot be told apart."""
    message = f"The model `{_show(model)}` does not exist; {HOW_TO_LIST}."
    return ApiError(404, message, param=param, code="model_not_found")


def _same(choice: AdapterChoice) -> object:
    return sorted((term.text, term.weight) for term in choice.terms), choice.merge


def _read_text(base_names: tuple[str, ...], param: str, text: str, origin: str | None) -> tuple[Term, ...]:
    """A name, "base:name", "name@version" or a mix of them; () for the base."""
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
            f"{param}: {_show(part)!r} is no part of a mix (in {_show(whole)!r}); expected NAME or NAME*WEIGHT, joined "
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
    """A term of several. Raises InvalidField for the base, which is there anyhow."""
    rest = strip_base(base_names, term.text)
    if rest is None:
        raise InvalidField(
            term.param, f"{term.param}: {_show(term.text)!r} is the base, which is always there in full; leave it out"
        )
    return replace(term, text=rest)


async def _lease(services: Services, term: Term, token: str | None) -> AdapterLease:
    """What is registered wins, or is on its way; then a source, where there is one. Raises ApiError, AdapterError."""
    name = term.text.partition("@")[0]
    if current_key().may_use(name):
        await services.adapters.arrival(name)
    try:
        return _find(services, term)
    except ApiError as error:
        if error.status != 404 or term.origin is None:
            raise
    if not current_key().load_on_use:
        raise not_found(term.text, term.param)
    if term.origin == "pbase":
        raise UnsupportedField(
            "adapter_source", "'adapter_source' is not supported as pbase: expected hub, local or s3"
        )
    source = permitted_source(services, source_of(term.origin, term.text))
    # without keys everybody is the operator; with them, nobody fetches with the operator's credentials but who may
    with counting_adapters() as owner:
        return await services.on_demand.lease(source, SourceAccess(token, ambient=current_key().admin), owner)


def _find(services: Services, term: Term) -> AdapterLease:
    """A lease of what is registered. Raises ApiError (404), AdapterRefused."""
    name, at, version = term.text.partition("@")
    registry = services.adapters.registry
    if is_hidden(name) or not current_key().may_use(name):
        raise not_found(term.text, term.param)
    try:
        return registry.lease_version(name, version) if at else registry.lease(name)
    except AdapterNotFound as error:
        if at and registry.get(name) is not None:
            raise ApiError(404, f"{term.param}: {error}", param=term.param, code="model_not_found") from None
        raise not_found(term.text, term.param) from None


def _show(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
