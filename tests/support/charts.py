"""The Helm chart as a cluster gets it: rendered by Helm's own code, offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.deployment import DEPLOY

helm_python = pytest.importorskip("helm_python", reason="helm-python-sdk has no wheel for this machine")

CHART = DEPLOY / "chart"
RELEASE, NAMESPACE = "prod", "serving"
FULL_NAME = "prod-loraplex"

Manifest = dict[str, Any]


def render(values: Mapping[str, Any]) -> list[Manifest]:
    """The manifests of a release with `values` over the chart's defaults. Raises HelmError where they are refused."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(dict(values)))  # as install and upgrade do; render alone does not
        texts = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return [
        document
        for name, text in texts.items()
        if not name.endswith("NOTES.txt")
        for document in yaml.safe_load_all(text)
        if document is not None
    ]


def notes(values: Mapping[str, Any]) -> str:
    """What helm prints after an installation."""
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return next(text for name, text in texts.items() if name.endswith("NOTES.txt"))


def values_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def only(manifests: list[Manifest], kind: str) -> Manifest:
    """The one manifest of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def workload(manifests: list[Manifest]) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] in ("Deployment", "StatefulSet"))
    return found


def pod(manifests: list[Manifest]) -> Manifest:
    """The spec of the server's pods."""
    return workload(manifests)["spec"]["template"]["spec"]


def container(manifests: list[Manifest]) -> Manifest:
    (found,) = pod(manifests)["containers"]
    return found
