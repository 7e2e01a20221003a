"""What a request wears: every way to name an adapter, or several with weights, to leases. The one lookup there is.

    model            "" (the base), "sql", "base:sql", "sql@3fa9c1d20b44", "sql@previous", "sql@prod" (a label),
                     "sql*0.7+pirate*0.3", "support" (an alias: what it stands for, for this request)
                     "@sha256:3fa9c1d20b44" (pushed without a name)
    adapters         [{"name": "sql", "weight": 0.7}, {"name": "pirate", "weight": 0.3}]
    adapter_id       LoRAX's, with an adapter_source an adapter not known here is loaded on first use
    merged_adapters  LoRAX's: linear is the same as `adapters`, the other strategies make an adapter of their own
    lora_path        SGLang's

Each value of each field is read alike: a name of the base, then "base:", "@" and the mix. Names that are registered
cannot hold ":", "@", "*" or "+", so no reading of a text hides another. Several adapters are computed in one launch,
each with its weight: exactly the sum, with nothing merged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from loraplex.adapters.errors import AdapterNotFound, VersionGone, VersionUnclear
from loraplex.adapters.sources.sources import SourceAccess
from loraplex.adapters.version import AdapterLease, AdapterVersion
from loraplex.server.api.alias_terms import expand, sticky_of
from loraplex.server.api.errors import ApiError, InvalidField, UnsupportedField, to_api_error
from loraplex.server.api.manage import counting_adapters, permitted_source, push_owner
from loraplex.server.api.schemas import AdapterFields
from loraplex.server.api.services import Services
from loraplex.server.api.wish import LORAX_BASE, AdapterChoice, Term, asks_for_base, read_text, read_wish, show
from loraplex.server.catalog.on_demand import PUSHED, is_hidden, source_of
from loraplex.server.catalog.version_lookup import MIN_DIGITS
from loraplex.server.engine.request import Mix
from loraplex.server.tenancy.tenants import current_key
from loraplex.server.text.tokenizer import Tokenizer
from loraplex.server.text.tokenizers import TokenizersDiffer

HOW_TO_LIST = "GET /v1/models lists the names served here"


@dataclass(frozen=True)
class AdapterUse:
    """Hold what one request wears, and how its texts are written then."""

    mix: Mix
    tokenizer: Tokenizer

    @property
    def tokens(self) -> int:
        """Return where the ids of tokens end that adapters have added; 0: none have."""
        return max((lease.version.info.tokens for lease, _ in self.mix), default=0)


@asynccontextmanager
async def leased(services: Services, record: AdapterFields) -> AsyncIterator[AdapterUse]:
    """Lease the adapters `record` asks for until the block ends; loading or merging them is done before it begins.

    Raises ApiError (400; 404 for a name nobody has), AdapterError for one that cannot be loaded or merged, Overloaded
    where there is no room for it, or no more for this caller.
    """
    choice = _chosen(services, record)
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
    """Refuse (InvalidField) an adapter that has rows in place of the base's in a mix, or weighted."""
    for term, lease in zip(choice.terms, leases, strict=True):
        if lease.version.info.alone and (len(leases) > 1 or term.weight != 1.0):
            param = term.param.partition(".")[0].partition("[")[0]
            raise InvalidField(
                param,
                f"{param}: the adapter {show(term.text)!r} has {lease.version.info.alone} of its own in place of the "
                "base's, which cannot be added to another's; ask for it alone, with weight 1",
            )


def shown_mix(mix: Mix) -> str:
    """Say what is worn in words that a later request may ask for: each adapter with 12 digits of its digest."""
    single = len(mix) == 1 and mix[0][1] == 1.0
    return "+".join(_shown_version(lease.version) + ("" if single else f"*{weight:g}") for lease, weight in mix)


def _shown_version(version: AdapterVersion) -> str:
    if version.name.startswith(PUSHED):
        return f"@sha256:{(version.digest or '')[:MIN_DIGITS]}"
    return f"{version.name}@{version.digest[:MIN_DIGITS]}" if version.digest else version.name


def _chosen(services: Services, record: AdapterFields) -> AdapterChoice:
    """Read what `record` asks for: aliases told apart, the default where no adapter is named. Raises ApiError."""
    names, told = services.facts.names, services.facts.config.adapters
    choice = read_wish(names, record)
    if not choice.terms and not asks_for_base(record):
        if told.require_adapter and told.default_adapter is None:
            message = f"model: it names no adapter, and this server wants one (--require-adapter); {HOW_TO_LIST}; the "
            raise InvalidField("model", f"{message}base alone is '{LORAX_BASE}'", code="adapter_required")
        if told.default_adapter is not None:
            choice = AdapterChoice(read_text(names, "model", told.default_adapter, None))
    terms = expand(services, choice.terms, sticky_of(record))
    if choice.merge is not None and len(terms) != len(choice.terms):
        raise InvalidField(
            "merged_adapters.ids", "merged_adapters.ids: an alias of a mix cannot be merged; name its parts"
        )
    return replace(choice, terms=terms)


def tokenizer_of(services: Services, model: str) -> Tokenizer:
    """Return the tokenizer of `model`. Raises ApiError (404) unless that could be worn now."""
    choice = AdapterChoice(read_text(services.facts.names, "model", model, None))
    choice = replace(choice, terms=expand(services, choice.terms, ""))
    if not choice.terms and not current_key().may_use_base:
        raise not_found(model)
    with ExitStack() as held:
        return _tokenizer(services, choice, [held.enter_context(_find(services, term)) for term in choice.terms])


def _check_fronts(choice: AdapterChoice, leases: Sequence[AdapterLease], weights: Sequence[float]) -> None:
    """Refuse (InvalidField) what stands in front of a prompt where it is weighted, or would be there twice."""
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
    """Return the mix's one tokenizer. Raises InvalidField where its adapters write texts differently."""
    try:
        return services.tokenizers.of([lease.version.info.tokenizer for lease in leases])
    except TokenizersDiffer as error:
        param = choice.terms[0].param.partition(".")[0].partition("[")[0]
        raise InvalidField(param, f"{param}: {error}") from None


def not_found(model: str, param: str = "model") -> ApiError:
    """Make the answer for a name that is not there, or not for this caller: they cannot be told apart."""
    message = f"The model `{show(model)}` does not exist; {HOW_TO_LIST}."
    return ApiError(404, message, param=param, code="model_not_found")


async def _lease(services: Services, term: Term, token: str | None) -> AdapterLease:
    """Lease what is registered or on its way, else what a source has. Raises ApiError, AdapterError."""
    name = term.text.partition("@")[0]
    if current_key().may_use(name):
        await services.adapters.arrival(name)
    try:
        return _find(services, term)
    except ApiError as error:
        if error.status != 404 or term.origin is None:
            raise
    if not current_key().load_on_use:
        raise not_found(term.asked, term.param)
    if term.origin == "pbase":
        raise UnsupportedField(
            "adapter_source", "'adapter_source' is not supported as pbase: expected hub, local or s3"
        )
    source = permitted_source(services, source_of(term.origin, term.text))
    # without keys everybody is the operator; with them, nobody fetches with the operator's credentials but who may
    with counting_adapters() as owner:
        return await services.on_demand.lease(source, SourceAccess(token, ambient=current_key().admin), owner)


def _find(services: Services, term: Term) -> AdapterLease:
    """Lease what is registered. Raises ApiError (404, 410), AdapterRefused, AdapterExpired."""
    if term.text.startswith("@"):
        return _find_pushed(services, term)
    name, at, wanted = term.text.partition("@")
    if is_hidden(name) or not current_key().may_use(name) or (at and not wanted):
        raise not_found(term.asked, term.param)
    adapters = services.adapters
    try:
        return adapters.lookup.lease(name, wanted)
    except (VersionGone, VersionUnclear) as error:
        known = to_api_error(error)
        raise ApiError(known.status, f"{term.param}: {error}", param=term.param, code=known.code) from None
    except AdapterNotFound as error:
        if at and adapters.registry.get(name) is not None:
            raise ApiError(404, f"{term.param}: {error}", param=term.param, code="model_not_found") from None
        raise not_found(term.asked, term.param) from None


def _find_pushed(services: Services, term: Term) -> AdapterLease:
    """Lease what the caller pushed without a name. Raises ApiError (404), AdapterExpired, RateLimited."""
    owner = push_owner()
    try:
        version = services.pushed.find(term.text, owner)
        if version is not None:
            with counting_adapters():
                return services.pushed.lease(version, owner)
    except AdapterNotFound as error:
        raise ApiError(404, f"{term.param}: {error}", param=term.param, code="model_not_found") from None
    raise not_found(term.asked, term.param)
