"""Composition: what proves adapters, around an engine that is built and a state that is open."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from loraplex.adapters.version import AdapterVersion
from loraplex.server.catalog.state_store import StateError, StateNotKept
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.catalog.version_records import StateChange
from loraplex.server.catalog.versions import Versions
from loraplex.server.command.build import EngineParts
from loraplex.server.proof.audit import AuditEvent, AuditLog, event_of
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


def make_prover(parts: EngineParts, names: tuple[str, ...], rest: float = REST) -> Prover:
    """Make what makes receipts of adapters of an engine's base, which is called `names`; in its event loop."""
    proof = parts.proof

    def identify() -> BaseIdentity:
        return BaseIdentity(names, proof.digest(), str(parts.formats))

    examine = Examiner(proof.measurer, proof.plain.logprobs, identify)
    prober = Prober(parts.engine, parts.adapters.registry, parts.model_config.vocab_size)
    return Prover(prober, parts.adapters.loader, examine, rest)
