"""The cards of what is served: the base and the adapters."""

from __future__ import annotations

from loraplex.adapters.files.tokenizer_files import NOTHING
from loraplex.adapters.registry import AdapterVersion
from loraplex.server.api.answer_schemas import AdapterReceipt, ModelCard, ModelPermission, TokenizerReceipt
from loraplex.server.api.names import not_found, strip_base
from loraplex.server.api.proof import prove
from loraplex.server.api.services import Services
from loraplex.server.catalog.on_demand import is_hidden
from loraplex.server.facts import Facts
from loraplex.server.tenancy.tenants import current_key


def list_cards(services: Services) -> list[ModelCard]:
    """The base under each of its names, then the adapters: what the caller may use of them."""
    names = services.facts.names if current_key().may_use_base else ()
    return [
        *(_base_card(services.facts, name) for name in names),
        *(_adapter_card(services.facts, version) for version in visible_adapters(services)),
    ]


def visible_adapters(services: Services) -> list[AdapterVersion]:
    """The adapters that the caller may know of, by name."""
    key = current_key()
    return [v for v in services.adapters.registry.list() if not is_hidden(v.name) and key.may_use(v.name)]


def find_card(services: Services, model: str) -> ModelCard:
    """The card of one name. Raises ApiError (404), also for what the caller may not use."""
    key = current_key()
    name = strip_base(services.facts.names, model)
    if name is None:
        if not key.may_use_base:
            raise not_found(model)
        return _base_card(services.facts, model)
    return _adapter_card(services.facts, _find(services, name, model))


async def find_receipt(services: Services, name: str, wait: float) -> AdapterReceipt:
    """What is known of an adapter, waiting up to `wait` seconds for what is measured of it.

    Raises ApiError (404), also for what the caller may not use.
    """
    version = _find(services, name, name)
    proof = await prove(services, version, wait)
    tokenizers, files = services.tokenizers, version.info.tokenizer
    difference = tokenizers.difference(files)
    own = tokenizers.of([files])
    return AdapterReceipt(
        id=version.name,
        created=version.created,
        source=version.origin,
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
        proof=proof,
    )


def _find(services: Services, name: str, asked: str) -> AdapterVersion:
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


def _adapter_card(facts: Facts, version: AdapterVersion) -> ModelCard:
    return ModelCard(
        id=version.name,
        created=version.created,
        root=version.origin,
        parent=facts.names[0],
        max_model_len=None,
        permission=[ModelPermission(id=f"modelperm-{version.name}-{version.uid}", created=version.created)],
    )
