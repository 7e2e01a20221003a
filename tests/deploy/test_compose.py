"""docker-compose.yml: valid to the Compose specification, and every path, port, flag and service it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests.support.deployment import DEPLOY, ROOT, flags_in, parse_command_line, routes, serve_flags
from tests.support.fake_serving import FakeServer

FILE = ROOT / "docker-compose.yml"
PROMETHEUS = DEPLOY / "prometheus/prometheus.yml"
PROVISIONING = DEPLOY / "grafana/provisioning"

PORTS = {"server": "8000", "prometheus": "9090", "grafana": "3000"}


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """What lies at each path of a container."""
    return {target: source for source, target, *_ in (each.split(":") for each in service["volumes"])}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_it_follows_the_specification() -> None:
    PyCompose.from_yaml(FILE.read_text(encoding="utf-8")).validate()
    with pytest.raises(ValueError, match="nonsense"):
        PyCompose.from_yaml("services: {a: {image: b, nonsense: c}}")


def test_the_server_takes_its_command(services: dict[str, dict[str, Any]]) -> None:
    server = services["server"]
    told = parse_command_line(server["command"])
    assert flags_in(server["command"]) <= serve_flags()
    assert str(told["adapter_dir"]) in mounts(server)
    assert str(told["port"]) == PORTS["server"]
    for kept in ("state_dir", "download_dir"):  # in the volume, so that a restart finds them
        assert mounts(server)["/" + Path(str(told[kept])).parts[1]] == "state"
    seconds = re.fullmatch(r"(\d+)s", server["stop_grace_period"])
    assert seconds is not None
    assert float(seconds[1]) > told["grace_seconds"]  # type: ignore[operator]


def test_the_server_is_built_from_a_target_that_is_there(services: dict[str, dict[str, Any]]) -> None:
    build = services["server"]["build"]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f" AS {build['target']}\n" in dockerfile
    assert all(f"\nARG {name}=" in dockerfile for name in build["args"])


def test_the_server_runs_without_rights(services: dict[str, dict[str, Any]]) -> None:
    server = services["server"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert {"/tmp"} == set(server["tmpfs"])
    volume = re.search(r"^VOLUME (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert volume is not None
    assert mounts(server)[volume[1]] == "state"


def test_paths_of_this_folder_are_there(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        for source in mounts(service).values():
            if source.startswith("."):
                assert (ROOT / source).exists(), source


def test_images_are_pinned_and_ports_stay_on_this_machine(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
        assert service["ports"] == [f"127.0.0.1:{PORTS[name]}:{PORTS[name]}"]


def test_prometheus_scrapes_the_server(services: dict[str, dict[str, Any]], server: FakeServer) -> None:
    where = mounts(services["prometheus"])
    flags = dict(flag.split("=", 1) for flag in services["prometheus"]["command"])
    assert where[flags["--config.file"]] == "./deploy/prometheus/prometheus.yml"
    assert where[flags["--storage.tsdb.path"]] == "prometheus"
    config = load(PROMETHEUS)
    folder = Path(flags["--config.file"]).parent
    assert [where[str(folder / each)] for each in config["rule_files"]] == ["./deploy/prometheus/alerts.yml"]
    (scrape,) = config["scrape_configs"]
    assert scrape["metrics_path"] in routes(server)
    assert scrape["static_configs"] == [{"targets": [f"server:{PORTS['server']}"]}]
    assert f'job="{scrape["job_name"]}"' in (DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8")


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, dict[str, Any]]) -> None:
    where = mounts(services["grafana"])
    assert where["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    (source,) = load(PROVISIONING / "datasources/prometheus.yml")["datasources"]
    assert source["url"] == f"http://prometheus:{PORTS['prometheus']}"
    (provider,) = load(PROVISIONING / "dashboards/loraplex.yml")["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    assert where[home] == "./deploy/grafana/dashboard.json"
