"""`loraplex adapters list` and `diff` against a whole server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.server.command import cli
from tests.support.served import Served, run, serve_new

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    adapters = {"one": {"r": 4, "target_modules": ["q_proj"]}, "other": {"r": 2, "target_modules": ["q_proj"]}}
    with serve_new(tmp_path_factory.mktemp("served"), adapters) as made:
        yield made


def test_list(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(served, "list", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["id"], each["rank"]) for each in found] == [("one", 4), ("other", 2)]
    served.live.ask("GET", "/v1/adapters/one?wait=60")
    assert run(served, "list") == 0
    head, first, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "kind", "rank", "pages", "digest", "effect", "source"]
    assert first.split()[:3] == ["one", "lora", "4"]
    assert first.split()[4] == found[0]["digest"][:12]
    assert float(first.split()[5]) > 0


def test_diff(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(served.folders["one"], tmp_path / "copy")
    assert served.live.load("copy", copy).status_code == 200
    assert run(served, "diff", "one", "copy") == 0
    assert capsys.readouterr().out == ""
    assert run(served, "diff", "one", "other") == 1
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["adapter.rank"] == "4 -> 2"
    assert "effect.sites.0.relative" in told
    assert "base.digest" not in told


def test_what_is_not_there(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(served, "diff", "one", "nobody") == 2
    assert "nobody" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.app(["adapters", "list", "--url", "http://127.0.0.1:9"], standalone_mode=False)
    assert ended.value.code == 2
