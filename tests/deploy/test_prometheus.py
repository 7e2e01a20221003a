"""A real Prometheus, configured as by compose, scrapes a live server under load: every panel shows something."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loraplex.server.config_access import AuthConfig
from loraplex.server.config_engine import EngineConfig
from loraplex.server.tenancy.keys_file import new_key
from tests.support.deployment import DEPLOY
from tests.support.live_server import live_server
from tests.support.peft_adapters import make_peft_adapter
from tests.support.processes import free_port, running
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer
from tests.support.waiting import LIMIT, wait_for

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: apt install prometheus"
)

PROMETHEUS = DEPLOY / "prometheus"


def expressions() -> list[str]:
    """The dashboard's, as Grafana asks them with everything selected."""
    dashboard = json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    for variable, value in (("$__rate_interval", "1m"), ("$model", ".*"), ("$instance", ".*"), ("$job", ".*")):
        found = [expression.replace(variable, value) for expression in found]
    return found


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Its HTTP API. Beside the target and the intervals it has what compose gives it."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    with running(command, folder / "prometheus.log", f"{url}/-/ready"):
        yield httpx.Client(base_url=f"{url}/api/v1", timeout=LIMIT)


def ask(client: httpx.Client, path: str, **parameters: str) -> Any:
    answer = client.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def has_scraped(client: httpx.Client, times: int) -> bool:
    try:
        found = ask(client, "/query", query='count_over_time(up{job="loraplex"}[5m]) and up == 1')["result"]
    except (httpx.TransportError, AssertionError):  # it is starting
        return False
    return bool(found) and int(found[0]["value"][1]) >= times


def test_every_panel_shows_what_happens(tmp_path: Path) -> None:
    base = make_tiny_tokenizer(make_tiny_model("llama", tmp_path / "tiny"))
    for seed, name in enumerate(("one", "two")):
        make_peft_adapter(load_oracle(base), tmp_path / "adapters" / name, seed=seed, r=2, target_modules=["q_proj"])
    (tmp_path / "adapters" / "bad").mkdir()
    (tmp_path / "adapters" / "bad" / "adapter_config.json").write_text("{}")
    keys = [
        new_key("ops", "acme", admin=True, adapters=["*"]),
        new_key("slow", "byte", adapters=["*"], requests_per_minute=1),
    ]
    auth = AuthConfig(open_metrics=True, allowed_paths=(tmp_path,))
    config = EngineConfig(device="cpu", memory=32 << 20, num_slots=1)
    with (
        live_server(base, "tiny", config, keys=keys, auth=auth) as server,
        prometheus(tmp_path, server.url[7:]) as client,
    ):
        for name in ("one", "two"):
            assert server.load(name, tmp_path / "adapters" / name, "ops").status_code == 200
        server.parts.adapters.register_unread(tmp_path / "adapters" / "bad")
        wait_for(lambda: has_scraped(client, 2))

        def work() -> None:
            """Each tenant asks for each adapter in turn, so that they push each other out; and what goes wrong."""
            for name in ("one", "two", "tiny"):
                body = {"model": name, "prompt": "the quick brown fox " * 8, "max_tokens": 4, "ignore_eos": True}
                assert server.ask("POST", "/v1/completions", "ops", json=body).status_code == 200
                server.ask("POST", "/v1/completions", "slow", json=body)
            assert server.load("bad", tmp_path / "adapters" / "bad", "ops").status_code == 400
            assert server.ask("GET", "/v1/models").status_code == 401

        for _ in range(5):
            work()
            time.sleep(0.5)
        ended = time.monotonic()
        wait_for(lambda: time.monotonic() > ended + 2.5)  # two more scrapes see the last of it
        empty = []
        for expression in expressions():
            values = [float(each["value"][1]) for each in ask(client, "/query", query=expression)["result"]]
            if not any(math.isfinite(value) for value in values):
                empty.append(expression)
        assert empty == []
        groups = ask(client, "/rules")["groups"]
        rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
        assert {rule["health"] for rule in rules.values()} == {"ok"}
        assert rules["LoraplexAdapterRefused"]["state"] in ("pending", "firing")
        assert rules["LoraplexDown"]["state"] == "inactive"
