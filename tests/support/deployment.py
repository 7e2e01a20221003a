"""What the files below deploy/ name, and what there is: flags, routes, metrics."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import typer.main
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from loraplex.adapters.histogram import Histogram
from loraplex.adapters.tiers.stats import AdapterPlace, AdapterStats, TierStats
from loraplex.server.api.gate import Gate
from loraplex.server.catalog.state_store import StateStore
from loraplex.server.catalog.state_writer import StateWriter
from loraplex.server.command.app import create_app
from loraplex.server.command.cli import app as cli
from loraplex.server.engine.stats import EngineStats
from loraplex.server.tenancy.access import Access
from loraplex.server.tenancy.keys_file import KeysFile, new_key
from tests.support.fake_serving import FakeServer

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"


def serve_flags() -> set[str]:
    """Every --flag of `loraplex serve`."""
    command = typer.main.get_command(cli).commands["serve"]  # type: ignore[attr-defined]
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def flags_in(arguments: Iterable[str]) -> set[str]:
    """The flags of a command line, without their values."""
    return {argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")}


def parse_command_line(arguments: list[str]) -> dict[str, object]:
    """What `loraplex ARGUMENTS` would be told: by flag ("state_dir" for --state-dir), and the base as "base".

    Raises click's usage errors.
    """
    command = typer.main.get_command(cli).commands[arguments[0]]  # type: ignore[attr-defined]
    context = command.make_context(arguments[0], list(arguments[1:]))
    flags = {each.name: each.opts[0].lstrip("-").replace("-", "_") for each in command.params}
    return {flags[name]: value for name, value in context.params.items()}


def routes(server: FakeServer) -> set[str]:
    """The paths of the application that answer a GET."""
    paths = create_app(server.services).openapi()["paths"]
    return {path for path, methods in paths.items() if "get" in methods}


def families(server: FakeServer) -> list[Metric]:
    """All that a server with keys and something in every tier exports."""
    durations = Histogram()
    durations.observe(0.01)
    tier = TierStats(hits=1, misses=1, loads=1, evictions=1, durations=durations)
    server.engine.current = EngineStats(
        running=1,
        pages={"kv": 1, "prefix": 1, "adapter": 1, "free": 1},
        adapters=AdapterStats(tiers={"device": tier, "host": tier, "source": tier}),
    )
    server.hold(AdapterPlace("sql", on_device=True, pinned=False))
    metrics = server.services.metrics
    metrics.add(_keys_in_use().collector())
    metrics.add(Gate().collector())
    with tempfile.TemporaryDirectory() as folder:
        metrics.add(StateWriter(StateStore(Path(folder))).collector())
    return list(text_string_to_metric_families(metrics.render().decode()))


def exported(server: FakeServer) -> dict[str, set[str]]:
    """The labels of every series of families(), by the series' name."""
    found: dict[str, set[str]] = {}
    for family in families(server):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _keys_in_use() -> Access:
    """Of a file, with a tenant who has gone beyond a limit."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("keys:\n" + new_key("ci", "acme")[1])
        file.flush()
        access = Access(KeysFile(Path(file.name)))
    access.limited["acme", "requests_per_minute"] = 1
    return access


_NOT_METRICS = re.compile(r'"[^"]*"|\[[^\]]*\]|\$\w+|\b(?:by|on|without|ignoring)\s*\([^)]*\)')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_NAME = re.compile(r"(?<![\w:.])([a-zA-Z_][\w:]*)(?!\s*\(|[\w:])")
_WORDS = {"and", "or", "unless", "bool", "offset", "by", "on", "without", "group_left", "group_right", "inf", "nan"}


def series_in(expression: str) -> dict[str, set[str]]:
    """The series that a PromQL expression reads, and the labels it selects each one by."""
    found: dict[str, set[str]] = {}
    for name, matchers in _SELECTOR.findall(expression):
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', "", matchers))
        found.setdefault(name, set()).update(labels)
    rest = _NOT_METRICS.sub(" ", re.sub(r"\{[^}]*\}", " ", expression))
    for name in _NAME.findall(rest):
        if name not in _WORDS:
            found.setdefault(name, set())
    return found


def grouped_by(expression: str) -> set[str]:
    """The labels that a PromQL expression groups or joins by."""
    lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    return {label.strip() for labels in lists for label in labels.split(",")}
