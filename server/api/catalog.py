"""The cards of what is served: the base and the adapters."""

from __future__ import annotations

from loraplex.adapters.files.tokenizer_files import NOTHING
from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.alias_terms import may_use_alias
from loraplex.server.api.answer_schemas import AdapterReceipt, ModelCard, ModelPermission, ProofAnswer, TokenizerReceipt
from loraplex.server.api.manage import push_owner
from loraplex.server.api.names import not_found
from loraplex.server.api.proof import prove
from loraplex.server.api.services import Services
from loraplex.server.api.version_cards import seconds_left, version_cards
from loraplex.server.api.wish import strip_base
from loraplex.server.catalog.aliases import Alias
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.catalog.pushed import shown_name
from loraplex.server.facts import Facts
from loraplex.server.tenancy.tenants import current_key


def list_cards(services: Services) -> list[ModelCard]:
    """The base under each of its names, the adapters, the aliases: what the caller may use of them."""
    names = services.facts.names if current_key().may_use_base else ()
    return [
        *(_base_card(services.facts, name) for name in names),
        *(_adapter_card(services, version) for version in visible_adapters(services)),
        *(_alias_card(services.facts, alias) for alias in visible_aliases(services)),
    ]


def visible_aliases(services: Services) -> list[Alias]:
    """The aliases that the caller may use, by name."""
    key = current_key()
    return [alias for alias in services.aliases.all() if may_use_alias(services, key, alias)]


def visible_adapters(services: Services) -> list[AdapterVersion]:
    """The adapters that the caller may know of, by name."""
    key = current_key()
    return [v for v in services.adapters.registry.list() if not is_hidden(v.name) and key.may_use(v.name)]


def shown_source(services: Services, version: AdapterVersion) -> str:
    """Where `version` came from; of what a client pushed its name, as where it was written is nobody's business."""
    return version.name if services.pushed.spool.owns(version.source) else version.origin


def find_card(services: Services, model: str) -> ModelCard:
    """The card of one name. Raises ApiError (404), also for what the caller may not use."""
    key = current_key()
    name = strip_base(services.facts.names, model)
    if name is None:
        if not key.may_use_base:
            raise not_found(model)
        return _base_card(services.facts, model)
    alias = services.aliases.get(name)
    if alias is not None and may_use_alias(services, key, alias):
        return _alias_card(services.facts, alias)
    return _adapter_card(services, _find(services, name, model))


async def find_receipt(services: Services, name: str, wait: float) -> AdapterReceipt:
    """What is known of an adapter, waiting up to `wait` seconds for what is measured of it.

    Raises ApiError (404, 410), also for what the caller may not use.
    """
    version = _find(services, name, name)
    return receipt_of(services, version, await prove(services, version, wait))


def receipt_of(services: Services, version: AdapterVersion, proof: ProofAnswer) -> AdapterReceipt:
    """What is known of a version."""
    tokenizers, files = services.tokenizers, version.info.tokenizer
    difference = tokenizers.difference(files)
    own = tokenizers.of([files])
    return AdapterReceipt(
        id=shown_name(version),
        created=version.created,
        source=shown_source(services, version),
        digest=version.digest,
        kind=version.info.kind,
        rank=version.info.rank,
        targets=list(version.info.targets),
        pages=version.info.num_pages,
        remark=version.info.remark or None,
        tokenizer=TokenizerReceipt(
            files=files != NOTHING,
            chat_template="adapter" if difference.template else "base" if own.has_chat_template else None,
            eos_tokens=list(difference.eos),
            special_tokens=dict(difference.special),
            added_tokens={token.text: token.id for token in difference.added},
        ),
        versions=version_cards(services, version.name),
        proof=proof,
        expires_in=services.pushed.seconds_left(version) or seconds_left(services, version),
    )


def _find(services: Services, name: str, asked: str) -> AdapterVersion:
    if name.startswith("@"):
        pushed = services.pushed.find(name, push_owner())
        if pushed is None:
            raise not_found(asked)
        return pushed
    version = services.adapters.registry.get(name)
    if version is None or is_hidden(name) or not current_key().may_use(name):
        raise not_found(asked)
    return version


def _base_card(facts: Facts, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=facts.created,
        root=facts.config.base,
        parent=None,
        max_model_len=facts.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{name}", created=facts.created)],
    )


def _alias_card(facts: Facts, alias: Alias) -> ModelCard:
    created = int(alias.changed)
    return ModelCard(
        id=alias.name,
        created=created,
        root=str(alias.state),
        parent=facts.names[0],
        max_model_len=None,
        permission=[ModelPermission(id=f"modelperm-{alias.name}-{alias.revision}", created=created)],
    )


def _adapter_card(services: Services, version: AdapterVersion) -> ModelCard:
    return ModelCard(
        id=version.name,
        created=version.created,
        root=shown_source(services, version),
        parent=services.facts.names[0],
        max_model_len=None,
        permission=[ModelPermission(id=f"modelperm-{version.name}-{version.uid}", created=version.created)],
    )
