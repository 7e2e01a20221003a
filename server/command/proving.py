"""Composition: what proves adapters, around an engine that is built and a state that is open."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from loraplex.adapters.registry import Registry
from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.state_store import StateError, StateNotKept
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import StateChange
from loraplex.server.catalog.versions import Versions
from loraplex.server.command.build import EngineParts
from loraplex.server.proof.audit import AuditEvent, AuditLog, event_of
from loraplex.server.proof.base_file import identified
from loraplex.server.proof.examiner import Examiner
from loraplex.server.proof.prober import Prober
from loraplex.server.proof.prover import REST, Prover
from loraplex.server.proof.receipt import BaseIdentity, Receipt
from loraplex.server.startup import StartError

logger = logging.getLogger(__name__)


def open_audit(state_dir: Path, versions: Versions) -> AuditLog:
    """Have every change of `versions` in the log from now on. Raises StartError."""
    try:
        audit = AuditLog(state_dir)
    except StateError as error:
        raise StartError(error) from error

    def note(change: StateChange) -> None:
        audit.append(event_of(change))

    versions.on_change(note)
    return audit


def note_operator(writer: StateWriter, registry: Registry, audit: AuditLog) -> None:
    """Have what the command line, folders and lists load and unload in the log, from what is there now on."""

    def note(what: Literal["load", "unload"], version: AdapterVersion, before: str) -> None:
        after = version.digest or "" if what == "load" else ""
        event = AuditEvent(what, version.name, time.time(), f"operator: {version.by}", before=before, after=after)

        def append() -> None:
            try:
                audit.append(event)
            except StateNotKept as error:  # it is done, and nobody asked who could be refused
                logger.warning("that %s had %r %sed is not in the audit log: %s", version.by, version.name, what, error)

        with suppress(RuntimeError):  # the state is closed, and the server with it
            writer.submit(append)

    registry.on_operator = note
    for version in registry.list():
        if version.by and version.digest is not None:
            note("load", version, "")


def keep_receipt(
    writer: StateWriter, versions: Versions, audit: AuditLog | None, version: AdapterVersion, receipt: Receipt
) -> None:
    """Keep a receipt with its version, and in the log, some time soon."""

    def keep() -> None:
        try:
            versions.set_receipt(version.name, receipt.measured.digest, receipt.text)
            if audit is not None:
                audit.append(
                    AuditEvent(
                        *("receipt", version.name, time.time()),
                        after=receipt.measured.digest,
                        receipt=receipt.digest,
                        card=dict(receipt.measured.card),
                    )
                )
        except StateNotKept as error:
            logger.warning("the receipt of adapter %r is not kept: %s", version.name, error)

    with suppress(RuntimeError):  # the state is closed, and the server with it
        writer.submit(keep)


def kept_receipt(versions: Versions, version: AdapterVersion) -> str:
    """Return what keep_receipt() has kept of a version; "": nothing."""
    row = versions.find(version.name, version.digest or "")
    return "" if row is None else row.receipt


def make_prover(
    parts: EngineParts, names: tuple[str, ...], rest: float = REST, state_dir: Path | None = None
) -> Prover:
    """Make what makes receipts of adapters of an engine's base, which is called `names`; in its event loop.

    state_dir: where it is kept what the base's files hash to.
    """
    proof = parts.proof

    def identify(throttle: Callable[[], None]) -> BaseIdentity:
        digest = identified(state_dir, lambda known: proof.digest(throttle, known))
        return BaseIdentity(names, digest, str(parts.formats))

    examine = Examiner(proof.measurer, proof.plain.logprobs, identify)
    prober = Prober(parts.engine, parts.adapters.registry, parts.model_config.vocab_size)
    return Prover(prober, parts.adapters.loader, examine, rest)
