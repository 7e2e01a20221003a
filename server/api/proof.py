"""A version's receipt, as routes tell it."""

from __future__ import annotations

from loraplex.adapters.version import AdapterVersion
from loraplex.server.api.answer_schemas import ProofAnswer, ProofStatus, ReceiptBody
from loraplex.server.api.services import Services
from loraplex.server.proof.prover import Prover

MAX_WAIT = 60.0
"""Seconds that a request may wait for a receipt."""


async def prove(services: Services, version: AdapterVersion, wait: float = 0.0) -> ProofAnswer:
    """Tell the receipt of `version`; where `wait` seconds are given, begin it if need be, and wait so long for it.

    Whoever only looks begins nothing: a list of a thousand adapters would be a thousand probes.
    """
    prover = services.prover
    receipt = None if prover is None else prover.known(version)
    if receipt is None and wait > 0 and prover is not None:
        receipt = await prover.wait(version, wait)
    if receipt is not None:
        body = ReceiptBody.model_validate(receipt.as_json())
        return ProofAnswer(status="made", error=None, digest=receipt.digest, receipt=body)
    failure = None if prover is None else prover.failure(version)
    return ProofAnswer(status=proof_status(prover, version), error=failure, digest=None, receipt=None)


def proof_status(prover: Prover | None, version: AdapterVersion) -> ProofStatus:
    """Say where the receipt of `version` is; "none": nobody has asked for it."""
    if prover is None:
        return "none"
    if prover.known(version) is not None:
        return "made"
    if prover.is_under_way(version):
        return "pending"
    return "none" if prover.failure(version) is None else "failed"
