"""Dashboard, alerts and scaling rules: every series they name is one that the server exports, and the alerts fire."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from tests.support.deployment import DEPLOY, ROOT, exported, families, grouped_by, series_in
from tests.support.fake_serving import FakeServer
from tests.support.waiting import LIMIT

PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana/dashboard.json"

BY_PROMETHEUS = {"job", "instance", "namespace", "service", "pod"}
"""Labels that come with the target, not from the server."""

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: apt install prometheus"
)


def run_promtool(*arguments: str | Path) -> None:
    command = ["promtool", *map(str, arguments)]
    result = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return group["rules"]


def adapter_rules() -> list[dict[str, Any]]:
    return yaml.safe_load((PROMETHEUS / "adapter-rules.yml").read_text(encoding="utf-8"))["rules"]


def check_series(expression: str, there_are: dict[str, set[str]]) -> None:
    """Every series is exported, with the labels that the expression selects and groups by."""
    read = series_in(expression)
    assert read, expression
    labels = set(BY_PROMETHEUS)
    for name, selected in read.items():
        assert name in there_are, f"{name} in {expression!r} is exported by nobody"
        assert selected <= there_are[name] | BY_PROMETHEUS, f"{name} has no such labels: {expression!r}"
        labels |= there_are[name]
    assert grouped_by(expression) <= labels, expression


@pytest.fixture
def there_are(server: FakeServer) -> dict[str, set[str]]:
    return exported(server) | {"up": set()}


def test_the_check_finds_what_is_not_exported(there_are: dict[str, set[str]]) -> None:
    for expression in (
        'rate(loraplex:no_such_total{instance="a"}[5m])',
        "vllm:no_such_metric > 5",
        'vllm:num_requests_waiting{no_such_label="a"}',
        "sum by (no_such_label) (vllm:num_requests_waiting)",
        "vllm:num_requests_waiting + on (no_such_label) up",
    ):
        with pytest.raises(AssertionError):
            check_series(expression, there_are)
    check_series('avg by (tier) (rate(loraplex:tier_hits_total{tier="device"}[5m])) > 0.5 and up == 1', there_are)


def test_the_dashboard_reads_what_is_exported(there_are: dict[str, set[str]]) -> None:
    for expression in dashboard_expressions():
        check_series(expression, there_are)
    variables = json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]
    queries = [v["definition"] for v in variables if v["type"] == "query"]
    for query in queries:
        series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
        check_series(series, there_are)
        (name,) = series_in(series)
        assert label in there_are[name] | BY_PROMETHEUS, query
    used = set(re.findall(r"\$(\w+)", " ".join(dashboard_expressions() + queries)))
    assert used - {"__rate_interval"} == {v["name"] for v in variables if v["type"] == "query"}


def test_the_alerts_read_what_is_exported(there_are: dict[str, set[str]]) -> None:
    for alert in alerts():
        check_series(alert["expr"], there_are)


def test_the_scaling_rules_read_what_is_exported(there_are: dict[str, set[str]]) -> None:
    for rule in adapter_rules():
        check_series(rule["seriesQuery"], there_are)


def test_the_documented_list_is_what_is_exported(server: FakeServer) -> None:
    """docs/metrics.md, written from what is exported: on a difference, the message has the row that is right."""
    rows = set(re.findall(r"^\| `.*\|$", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {_row(family) for family in families(server) if not family.name.endswith("_created")}
    assert len(wanted) > 60
    assert rows == wanted


def _row(family: Metric) -> str:
    """A row of docs/metrics.md; labels that all of a server's series have are said once, above the table."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "engine", "le"}
    text = family.documentation.replace("|", "\\|")
    return f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in sorted(labels))} | {text} |"


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


@promtool
def test_every_expression_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:{i}", "expr": expression.replace("$__rate_interval", "1m")}
        for i, expression in enumerate(dashboard_expressions())
    ]
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    run_promtool("check", "rules", path)


@promtool
def test_prometheus_takes_its_configuration_and_the_alerts() -> None:
    run_promtool("check", "config", "prometheus.yml")


@promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    run_promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_played() -> None:
    played = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    checks = [check for test in played for check in test["alert_rule_test"]]
    names = {alert["alert"] for alert in alerts()}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    healthy = {check["alertname"] for check in played[0]["alert_rule_test"] if not check.get("exp_alerts")}
    assert healthy == names


def test_the_played_series_are_exported(there_are: dict[str, set[str]]) -> None:
    played = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    for test in played:
        for series in test["input_series"]:
            (name, labels), *more = series_in(series["series"]).items()
            assert not more
            assert labels == there_are[name] | {"job", "instance"}, series


@promtool
def test_promtool_finds_nothing_to_mend_in_what_is_exported(server: FakeServer) -> None:
    exported(server)
    text = server.services.metrics.render()
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, timeout=LIMIT, check=False
    )
    complaints = [
        line
        for line in result.stderr.decode().splitlines()
        # vLLM's names are as they are, and have colons, which Prometheus keeps for recording rules: ours follow them
        if not line.startswith("vllm:") and "should not contain ':'" not in line
    ]
    assert complaints == []
