"""A version's receipt, as routes tell it."""

from __future__ import annotations

from typing import Literal

from loraplex.adapters.registry import AdapterVersion
from loraplex.server.api.answer_schemas import ProofAnswer, ReceiptBody
from loraplex.server.api.services import Services

MAX_WAIT = 60.0
"""Seconds that a request may wait for a receipt."""


async def prove(services: Services, version: AdapterVersion, wait: float = 0.0) -> ProofAnswer:
    """Tell the receipt of `version`; where `wait` seconds are given, begin it if need be, and wait so long for it.

    Whoever only looks begins nothing: a list of a thousand adapters would be a thousand probes.
    """
    prover = services.prover
    if prover is None:
        return ProofAnswer(status="none", error=None, digest=None, receipt=None)
    receipt = prover.known(version)
    if receipt is None and wait > 0:
        receipt = await prover.wait(version, wait)
    if receipt is not None:
        body = ReceiptBody.model_validate(receipt.as_json())
        return ProofAnswer(status="made", error=None, digest=receipt.digest, receipt=body)
    failure = prover.failure(version)
    status: Literal["pending", "failed", "none"] = "none" if failure is None else "failed"
    if prover.is_under_way(version):
        status = "pending"
    return ProofAnswer(status=status, error=failure, digest=None, receipt=None)
