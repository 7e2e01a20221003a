"""What --default-adapter names is there when the server begins to listen, or it does not begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraplex.adapters.errors import AdapterRefused
from loraplex.server.catalog.aliases import AliasState, Target
from loraplex.server.command.defaults import check_default
from loraplex.server.startup import StartError
from tests.support.fake_serving import FakeServer, make_fake_server
from tests.support.tiny import make_tiny_tokenizer


@pytest.fixture
def server(tmp_path: Path) -> FakeServer:
    return make_fake_server(make_tiny_tokenizer(tmp_path))


async def test_what_is_there_or_comes_will_do(server: FakeServer) -> None:
    await server.adapters.register("sql", "/sql")
    server.adapters.registry.mark_refused("bad", AdapterRefused("bad_config", "nonsense"))
    services = server.services
    await services.aliases.put("support", AliasState("split", (Target("sql", 1.0),)))
    for name in (None, "sql", "sql@latest", "sql*0.5+bad*0.5", "support", "bad", services.facts.names[0]):
        check_default(services, name)


@pytest.mark.parametrize("name", ["sqll", "sql*0.5+sqll*0.5", "sqll@0123456789ab", "sql*x"])
async def test_an_unknown_one_is_told_in_one_line(server: FakeServer, name: str) -> None:
    await server.adapters.register("sql", "/sql")
    with pytest.raises(StartError) as refused:
        check_default(server.services, name)
    assert "--default-adapter" in str(refused.value)
    assert "\n" not in str(refused.value)
