"""Receipts: which base is named, what a reader should look at, and a digest of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from loraplex.adapters.receipt import Measured, SiteEffect
from loraplex.server.proof.receipt import BaseIdentity, Probe, Receipt

SITE = SiteEffect(("o_proj",), 2, 0.0123456789, 0.2, 1, 1e-3)
MEASURED = Measured(
    *("ab" * 32, "lora", 8, 8, (), ("bfloat16",), "bfloat16", 4, 0),
    (SITE,),
    0.01,
    1e-3,
    0.0,
    0,
    "org/SmolLM2-135M-Instruct",
)
BASE = BaseIdentity(("demo", "/models/smollm2-135m-instruct"), "cd" * 32, "bfloat16")
RECEIPT = Receipt(MEASURED, BASE, Probe(11, 0.01, 0.02))


@pytest.mark.parametrize(
    ("loaded_from", "named", "is_named"),
    [
        ("/models/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/home/me/SmolLM2-135M-Instruct/", True),
        ("/c/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93ef", "HuggingFaceTB/SmolLM2-135M", True),
        ("/c/hub/models--gpt2/snapshots/93ef", "gpt2", True),
        ("/models/tiny.gguf", "org/tiny", True),
        ("/models/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M", False),
        ("/models/smollm2-135m-instruct", None, None),
        ("/models/smollm2-135m-instruct", "", None),
    ],
)
def test_whether_the_named_base_is_this_one(loaded_from: str, named: str | None, is_named: bool | None) -> None:
    base = replace(BASE, names=("demo", loaded_from))
    receipt = replace(RECEIPT, base=base, measured=replace(MEASURED, base_named=named))
    assert receipt.as_json()["base"]["is_named"] is is_named
    assert ("names the base" in receipt.remark) is (is_named is False)


@pytest.mark.parametrize(
    "receipt",
    [
        RECEIPT,
        replace(RECEIPT, probe=None, probe_error="busy"),
        replace(RECEIPT, probe=Probe(11, 0.2, float("nan"))),
        replace(
            RECEIPT,
            measured=replace(
                MEASURED, ignored=("a", "b"), own=2, base_named=None, card={"tags": ["x"], "license": "mit"}
            ),
        ),
    ],
)
def test_what_was_kept_is_read_again(receipt: Receipt) -> None:
    found = Receipt.read(receipt.text, BASE)
    assert found is not None
    assert (found.text, found.digest, found.remark, found.doubt) == (
        receipt.text,
        receipt.digest,
        receipt.remark,
        receipt.doubt,
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", RECEIPT.text[:-1], RECEIPT.text.replace(",", ", ")])
def test_what_is_no_receipt_is_none(text: str) -> None:
    assert Receipt.read(text, BASE) is None


def test_a_receipt_of_another_base_is_none_of_this_one() -> None:
    assert Receipt.read(RECEIPT.text, replace(BASE, digest="ef" * 32)) is None
    assert Receipt.read(RECEIPT.text, replace(BASE, formats="nf4")) is None


def test_what_comes_to_nothing_is_remarked() -> None:
    assert RECEIPT.remark == ""
    assert "1 of its 4 modules" in replace(RECEIPT, measured=replace(MEASURED, idle=1)).remark
    noop = replace(RECEIPT, measured=replace(MEASURED, sites=(), idle=4))
    assert "changes nothing" in noop.remark
    assert noop.as_json()["adapter"]["noop"] is True


@pytest.mark.parametrize(
    ("probe", "doubted"),
    [
        (Probe(11, 0.2, 0.5), False),
        (Probe(11, 1e-6, 0.03), False),
        (Probe(11, 1e-6, 0.05), True),
        (Probe(11, 0.2, 0.9), True),
        (Probe(11, 0.2, float("nan")), True),
        (None, True),
    ],
)
def test_what_is_doubted(probe: Probe | None, doubted: bool) -> None:
    receipt = replace(RECEIPT, probe=probe, probe_error=None if probe else "busy")
    assert (receipt.doubt is not None) is doubted


def test_the_digest_is_of_all_that_is_shown_and_of_nothing_else() -> None:
    text = json.dumps(RECEIPT.as_json(), sort_keys=True, separators=(",", ":"))
    assert RECEIPT.digest == hashlib.sha256(text.encode()).hexdigest()
    assert replace(RECEIPT, seconds=3.0).digest == RECEIPT.digest
    changed = [
        replace(RECEIPT, probe=None, probe_error="busy"),
        replace(RECEIPT, measured=replace(MEASURED, sites=(replace(SITE, layer=2),))),
        replace(RECEIPT, base=replace(BASE, formats="nf4")),
    ]
    assert len({RECEIPT.digest, *(each.digest for each in changed)}) == 4


def test_numbers_are_told_in_six_digits() -> None:
    assert RECEIPT.as_json()["effect"]["sites"][0]["relative"] == 0.0123457
