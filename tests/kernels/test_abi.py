"""The constants and records that Python and C++ must agree on are compared when the library is loaded."""

from __future__ import annotations

import pytest

from loraplex.kernels.cpu import abi


@pytest.mark.parametrize("what", ["ranks of a tile", "bytes of an op", "bytes of steps"])
def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setitem(abi._CONSTANTS, what, abi._CONSTANTS[what] + 1)
    with pytest.raises(abi.LibraryMissing, match=f"another version \\({what}: .*install again"):
        abi.library.__wrapped__()
