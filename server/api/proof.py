"""A version's receipt, as routes tell it."""

from __future__ import annotations

from typing import Literal

from loraplex.adapters.registry import AdapterVersion
from loraplex.server.api.answer_schemas import ProofAnswer, ReceiptBody
from loraplex.server.api.services import Services

MAX_WAIT = 60.0
"""Seconds that a request may wait for a receipt."""


async def prove(services: Services, version: AdapterVersion, wait: float = 0.0, *, begin: bool = True) -> ProofAnswer:
    """Tell the receipt of `version`, waiting up to `wait` seconds for it; if `begin`, it is begun where it is not made.

    It is not where adapters come by the second: making one is a fifth of a core for seconds.
    """
    prover = services.prover
    if prover is None:
        return ProofAnswer(status="none", error=None, digest=None, receipt=None)
    receipt = prover.known(version)
    if begin and receipt is None and (prover.failure(version) is None or wait > 0):
        prover.begin(version)
        receipt = await prover.wait(version, wait) if wait > 0 else None
    if receipt is not None:
        body = ReceiptBody.model_validate(receipt.as_json())
        return ProofAnswer(status="made", error=None, digest=receipt.digest, receipt=body)
    failure = prover.failure(version)
    status: Literal["pending", "failed"] = "pending" if prover.is_under_way(version) or failure is None else "failed"
    return ProofAnswer(status=status, error=failure, digest=None, receipt=None)
