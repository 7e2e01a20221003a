"""`loraplex adapters history`, `promote`, `rollback` and `push` against a whole server."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.adapters.sources.remote import CONFIG_FILE, WEIGHTS_FILE
from loraplex.server.command import cli
from loraplex.server.command.placing import FormBody
from tests.support.served import Served, run, serve_new

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    adapters = {name: {"r": 4, "target_modules": ["q_proj"]} for name in ("one", "other")}
    with serve_new(tmp_path_factory.mktemp("served"), adapters) as made:
        yield made


def digest_of(folder: Path) -> str:
    """As docs/push.md has it: of the config's bytes and then the weights'."""
    return hashlib.sha256((folder / CONFIG_FILE).read_bytes() + (folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def test_push_and_history(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (served.folders[name] for name in ("one", "other"))
    assert run(served, "push", "sent", str(first), "--expected", "", "--retain", "1") == 0
    assert capsys.readouterr().out.strip() == f"sent@{digest_of(first)}"
    assert run(served, "push", "sent", str(second), "--expected", digest_of(first)[:12], "--retain", "1", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["id"], told["digest"]) == ("sent", digest_of(second))
    assert served.live.text("sent", 6) == served.live.text("other", 6)
    assert served.live.text("sent@previous", 6) == served.live.text("one", 6)
    assert run(served, "history", "sent") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["digest", "state", "labels", "loaded", "(UTC)", "by", "source"]
    assert [line.split()[:2] for line in lines] == [[digest_of(second), "serving"], [digest_of(first), "kept"]]
    assert run(served, "history", "sent", "--json") == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["serving", "kept"]


def test_what_is_refused_changes_nothing(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = served.folders["one"]
    assert run(served, "push", "kept", str(one)) == 0
    assert run(served, "push", "kept", str(served.folders["other"]), "--expected", "0" * 64) == 1
    assert digest_of(one) in capsys.readouterr().err
    broken = shutil.copytree(one, tmp_path / "broken")
    (broken / WEIGHTS_FILE).write_bytes((one / WEIGHTS_FILE).read_bytes()[:-8])
    assert run(served, "push", "kept", str(broken)) == 1
    (broken / WEIGHTS_FILE).unlink()
    assert run(served, "push", "kept", str(broken)) == 2
    assert WEIGHTS_FILE in capsys.readouterr().err
    assert served.live.ask("GET", "/v1/adapters/kept").json()["digest"] == digest_of(one)


def test_promote_and_roll_back(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [{"adapter": "one", "weight": 95}, {"adapter": "other", "weight": 5}]
    served.live.ask("PUT", "/v1/aliases/front", json={"targets": targets})
    assert run(served, "promote", "front") == 0
    assert capsys.readouterr().out == "front (revision 2): split other 1\n"
    assert served.live.text("front", 6) == served.live.text("other", 6)
    assert run(served, "rollback", "front", "--expected", "1") == 1
    assert run(served, "rollback", "front", "--expected", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["targets"] == targets
    assert run(served, "promote", "front", "--target", "one") == 0
    assert capsys.readouterr().out == "front (revision 4): split one 1\n"
    assert run(served, "promote", "front", "--target", "nobody") == 1


def test_what_is_not_there(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["history", "nobody"], ["promote", "nobody"], ["rollback", "nobody"]):
        assert run(served, *given) == 2
        assert "nobody" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.app(["adapters", "history", "one", "--url", "http://127.0.0.1:9"], standalone_mode=False)
    assert ended.value.code == 2


def test_a_form_is_as_long_as_it_says(served: Served) -> None:
    body = FormBody(served.folders["one"], "b0undary")
    assert body.nbytes == len(b"".join(body)) == int(body.headers()["Content-Length"])
