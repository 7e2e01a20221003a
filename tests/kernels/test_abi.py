"""A library that was built from other constants or records than Python has is refused when it is loaded."""

from __future__ import annotations

import ctypes

import pytest

from loraplex.kernels.cpu import abi


def test_a_library_of_other_constants_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "C_CONSTANTS", abi.C_CONSTANTS.replace("kTileRanks = 16", "kTileRanks = 32"))
    with pytest.raises(abi.LibraryMissing, match=r"another version \(another kernels/constants.py\); install again"):
        abi.library.__wrapped__()


@pytest.mark.parametrize("record", abi.RECORDS, ids=lambda record: record.__name__)
def test_a_library_of_other_records_is_refused(monkeypatch: pytest.MonkeyPatch, record: type[ctypes.Structure]) -> None:
    longer = type("Longer", (record,), {"_fields_": [("new", ctypes.c_int64)]})
    monkeypatch.setattr(abi, "RECORDS", tuple(longer if each is record else each for each in abi.RECORDS))
    with pytest.raises(abi.LibraryMissing, match=r"another version \(Longer has .*install again"):
        abi.library.__wrapped__()
