"""The chart's values: what is refused, and that each is described."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.charts import CHART, helm_python, render, values_of

KEDA = {"autoscaling": {"keda": {"enabled": True, "minReplicas": 0}}}
BOTH = {"autoscaling": {"keda": {"enabled": True}, "hpa": {"enabled": True}}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 2}, "replica"),  # a name that is misspelled
        ({"server": {"ports": 8000}}, "ports"),
        ({"replicas": -1}, "replicas"),
        ({"replicas": "2"}, "replicas"),
        ({"server": {"port": 70000}}, "port"),
        ({"server": {"memory": "lots"}}, "memory"),
        ({"server": {"memory": 4}}, "memory"),
        ({"server": {"hostMemory": "50%"}}, "hostMemory"),
        ({"server": {"logFormat": "xml"}}, "logFormat"),
        ({"workload": "DaemonSet"}, "workload"),
        ({"base": {"model": ""}}, "model"),
        ({"base": {"quantize": "int2"}}, "quantize"),
        ({"gpu": {"count": 2}}, "count"),
        ({"adapters": {"ensurePresent": [{"name": "a"}]}}, "source"),
        ({"adapters": {"ensurePresent": [{"name": "a,b", "source": "x"}]}}, "name"),  # routers split names at commas
        ({"adapters": {"ensurePresent": [{"name": "a/b/c", "source": "x"}]}}, "name"),
        ({"adapters": {"persistence": {"size": "big"}}}, "size"),
        ({"adapters": {"persistence": {"accessModes": []}}}, "accessModes"),
        ({"metrics": {"serviceMonitor": {"interval": "15"}}}, "interval"),
        ({"autoscaling": {"hpa": {"waitingRequests": 0}}}, "waitingRequests"),
        ({"autoscaling": {"keda": {"prometheus": "prometheus:9090"}}}, "prometheus"),
        (BOTH, "both enabled"),
        (KEDA, "extraTriggers"),
        ({"gateway": {"enabled": True, "parentRefs": [{"name": "g"}]}}, "gateway.endpointPicker"),
        ({"gateway": {"enabled": True, "endpointPicker": "epp"}}, "gateway.parentRefs"),
        ({"replicas": 2, "adapters": {"persistence": {"enabled": True}}}, "ReadWriteMany"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(said)):
        render(values)


def test_helm_finds_nothing_to_mend() -> None:
    found = helm_python.lint(CHART)
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value and path + key != "resources":
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def test_the_table_has_every_value_and_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.+?) \|$", (CHART / "README.md").read_text("utf-8"), re.MULTILINE)
    table = {name: yaml.safe_load(default.strip("`")) for name, default, _ in rows}
    assert len(table) == len(rows)
    assert table == dict(leaves(values_of(CHART / "values.yaml")))


def schema_leaves(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, value in schema.get("properties", {}).items():
        if "properties" in value:
            yield from schema_leaves(value, f"{path}{key}.")
        else:
            yield path + key


def test_the_schema_knows_every_value_and_no_other() -> None:
    import json

    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    described = set(schema_leaves(schema)) - {"global"}  # helm's own
    assert described == {name for name, _ in leaves(values_of(CHART / "values.yaml"))}
