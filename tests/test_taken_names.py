"""No door lets an adapter have one of the base's names: requests for them are the base's."""

from __future__ import annotations

import pytest

from loraplex.adapters.errors import AdapterRefused, InvalidAdapterName
from loraplex.adapters.info import AdapterInfo
from loraplex.adapters.registry import Registry


@pytest.mark.parametrize("name", ["tiny", "alias"])
def test_the_registry_refuses_them_by_every_way_in(name: str) -> None:
    registry = Registry(taken=("tiny", "alias"))
    info = AdapterInfo(1, ("q_proj",), 1, 1)
    with pytest.raises(InvalidAdapterName, match="is the base's own"):
        registry.register(name, "x", info)
    with pytest.raises(InvalidAdapterName, match="is the base's own"):
        registry.mark_refused(name, AdapterRefused("bad_file", "x"))
    registry.register("tiny2", "x", info)
    assert [version.name for version in registry.list()] == ["tiny2"]
    assert not registry.refused
