"""The chart: what it renders is valid to Kubernetes and the CRDs, names only what the server has, and fits together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.charts import (
    CHART,
    FULL_NAME,
    NAMESPACE,
    Manifest,
    container,
    notes,
    only,
    pod,
    render,
    values_of,
    workload,
)
from tests.support.deployment import DEPLOY, exported, flags_in, parse_command_line, routes, series_in, serve_flags
from tests.support.fake_serving import FakeServer

HERE = Path(__file__).parent
VALUES = {path.stem: values_of(path) for path in sorted((HERE / "values").glob("*.yaml"))}
CRDS = yaml.safe_load((HERE / "crds.yaml").read_text(encoding="utf-8"))

KUBERNETES = ("1.30", "1.37")
"""The oldest that the chart installs on, and the newest whose schemas the validator has."""

every = pytest.mark.parametrize("name", VALUES)


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render(values) for name, values in VALUES.items()}


# ---- valid ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_it(rendered: dict[str, list[Manifest]], name: str, version: str) -> None:
    for manifest in rendered[name]:
        if manifest["kind"] not in CRDS:
            kubernetes_validate.validate(manifest, version, strict=True)


@every
def test_the_custom_resources_are_valid(rendered: dict[str, list[Manifest]], name: str) -> None:
    for manifest in rendered[name]:
        if (definition := CRDS.get(manifest["kind"])) is not None:
            assert manifest["apiVersion"] == definition["apiVersion"]
            jsonschema.Draft202012Validator(definition["spec"]).validate(manifest["spec"])


def test_the_value_files_render_every_kind(rendered: dict[str, list[Manifest]]) -> None:
    kinds = {manifest["kind"] for manifests in rendered.values() for manifest in manifests}
    assert kinds >= {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "NetworkPolicy", "PersistentVolumeClaim",
        "PodDisruptionBudget", "Secret", "Service", "ServiceAccount", "StatefulSet", *CRDS,
    }  # fmt: skip


@every
def test_names_are_taken_once(rendered: dict[str, list[Manifest]], name: str) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered[name]]
    assert len(names) == len(set(names))
    assert all(kind_and_name[1].startswith((FULL_NAME, "llm")) for kind_and_name in names)


def test_the_custom_schemas_refuse_what_is_wrong() -> None:
    pool = only(render(VALUES["gateway"]), "InferencePool")["spec"]
    for wrong in ({"targetPortNumber": 8000}, {"targetPorts": []}, {"endpointPickerRef": {"name": "epp"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(pool | wrong, CRDS["InferencePool"]["spec"])


# ---- what the server is told ----------------------------------------------------------------------------------------


@every
def test_the_server_takes_its_command_line(rendered: dict[str, list[Manifest]], name: str) -> None:
    arguments = container(rendered[name])["args"]
    assert flags_in(arguments) <= serve_flags()
    told = parse_command_line(arguments)
    values = {"base": {"model": "demo"}, "server": {"port": 8000}} | VALUES[name]
    assert told["base"] == values["base"]["model"]
    assert told["port"] == values["server"].get("port", 8000)


@every
async def test_probes_and_scrapes_ask_for_what_is_there(
    rendered: dict[str, list[Manifest]], name: str, server: FakeServer
) -> None:
    there_are = routes(server)
    spec = container(rendered[name])
    (port,) = spec["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = spec[probe]["httpGet"]
        assert asked["path"] in there_are, probe
        assert asked["port"] == port["name"]
    for manifest in rendered[name]:
        match manifest["kind"]:
            case "Service":
                assert [each["targetPort"] for each in manifest["spec"]["ports"]] == [port["name"]]
            case "ServiceMonitor":
                (endpoint,) = manifest["spec"]["endpoints"]
                assert endpoint["path"] in there_are
                assert endpoint["port"] == port["name"]
            case "InferencePool":
                assert manifest["spec"]["targetPorts"] == [{"number": port["containerPort"]}]
            case "NetworkPolicy":
                assert manifest["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["name"]}]


@every
async def test_scaling_reads_what_is_exported(
    rendered: dict[str, list[Manifest]], name: str, server: FakeServer
) -> None:
    there_are = exported(server)
    rules = yaml.safe_load((DEPLOY / "prometheus/adapter-rules.yml").read_text(encoding="utf-8"))["rules"]
    from_rules = {rule["name"]["as"] for rule in rules}
    for manifest in rendered[name]:
        match manifest["kind"]:
            case "ScaledObject":
                queries = [trigger["metadata"]["query"] for trigger in manifest["spec"]["triggers"][:2]]
                for query in queries:
                    ((series, labels),) = series_in(query).items()
                    assert series in there_are
                    assert labels == {"namespace", "service"}
                    assert f'namespace="{NAMESPACE}",service="{FULL_NAME}"' in query
            case "HorizontalPodAutoscaler":
                metrics = manifest["spec"]["metrics"]
                assert {each["pods"]["metric"]["name"] for each in metrics if each["type"] == "Pods"} <= from_rules


@every
def test_paths_given_to_the_server_are_mounted(rendered: dict[str, list[Manifest]], name: str) -> None:
    spec = container(rendered[name])
    mounts = {mount["mountPath"]: mount for mount in spec["volumeMounts"]}
    paths = [argument.partition("=")[2] for argument in spec["args"] if "=/" in argument]
    if VALUES[name].get("base", {}).get("claim"):
        assert mounts["/models"]["readOnly"]
    for path in paths:
        assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), path
    claimed = workload(rendered[name])["spec"].get("volumeClaimTemplates", [])
    volumes = [*pod(rendered[name])["volumes"], *(claim["metadata"] for claim in claimed)]
    assert {volume["name"] for volume in volumes} == {mount["name"] for mount in mounts.values()}


@every
def test_config_maps_and_secrets_that_are_mounted_are_there(rendered: dict[str, list[Manifest]], name: str) -> None:
    made = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in rendered[name]}
    values = VALUES[name]
    given = {
        ("Secret", values.get("keys", {}).get("existingSecret")),
        ("PersistentVolumeClaim", values.get("base", {}).get("claim")),
        ("PersistentVolumeClaim", values.get("adapters", {}).get("persistence", {}).get("existingClaim")),
    }
    for volume in pod(rendered[name])["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in made
        if "secret" in volume:
            assert ("Secret", volume["secret"]["secretName"]) in made | given
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in made | given
    account = pod(rendered[name])["serviceAccountName"]
    assert ("ServiceAccount", account) in made or account == "default"


@every
def test_selectors_find_the_pods(rendered: dict[str, list[Manifest]], name: str) -> None:
    labels = workload(rendered[name])["spec"]["template"]["metadata"]["labels"]
    for manifest in rendered[name]:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget" | "InferencePool":
                selector = spec["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = spec["podSelector"]["matchLabels"]
            case "Service":
                selector = spec["selector"]
            case _:
                continue
        assert selector.items() <= labels.items(), manifest["kind"]
        assert "helm.sh/chart" not in selector  # it changes with an upgrade, and selectors must not
    for constraint in pod(rendered[name]).get("topologySpreadConstraints", []):
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()


@every
def test_the_monitor_finds_one_service(rendered: dict[str, list[Manifest]], name: str) -> None:
    for monitor in (each for each in rendered[name] if each["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        services = [each for each in rendered[name] if each["kind"] == "Service"]
        found = [each["metadata"]["name"] for each in services if wanted <= each["metadata"]["labels"].items()]
        assert found == [FULL_NAME]  # two would count every server twice


# ---- behaviour ------------------------------------------------------------------------------------------------------


@every
def test_it_runs_without_rights(rendered: dict[str, list[Manifest]], name: str) -> None:
    spec, server = pod(rendered[name]), container(rendered[name])
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    assert not any(mounts[path].get("readOnly") for path in ("/state", "/tmp"))


@every
def test_a_stopping_pod_gets_its_time(rendered: dict[str, list[Manifest]], name: str) -> None:
    values = VALUES[name].get("server", {})
    grace, delay = values.get("graceSeconds", 60), values.get("drainDelaySeconds", 5)
    spec, server = pod(rendered[name]), container(rendered[name])
    assert spec["terminationGracePeriodSeconds"] >= grace + delay
    assert server.get("lifecycle") == ({"preStop": {"sleep": {"seconds": delay}}} if delay else None)


def test_startup_waits_as_long_as_it_is_told() -> None:
    for seconds in (1, 2, 61, 600):
        probe = container(render({"server": {"startupSeconds": seconds}}))["startupProbe"]
        assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] <= seconds + probe["periodSeconds"]


def test_threads_follow_the_request_where_there_is_no_limit() -> None:
    def names(resources: dict[str, Any]) -> list[str]:
        return [variable["name"] for variable in container(render({"resources": resources})).get("env", [])]

    assert names({"requests": {"cpu": "3"}}) == ["OMP_NUM_THREADS"]
    assert names({"requests": {"cpu": "3"}, "limits": {"cpu": "4"}}) == []  # the server sees the quota by itself
    assert names({"requests": {"cpu": None}}) == []


def test_adapters_reach_the_file_as_they_were_given() -> None:
    wanted = [{"name": "a/b", "source": "s3://bucket/a: b#c", "pinned": True}, {"name": "x", "source": "org/x"}]
    text = only(render({"adapters": {"ensurePresent": wanted, "ensureAbsent": ["old"]}}), "ConfigMap")["data"]
    assert yaml.safe_load(text["adapters.yaml"]) == {"ensurePresent": wanted, "ensureAbsent": ["old"]}


def test_keys_reach_the_file_as_they_were_given(rendered: dict[str, list[Manifest]]) -> None:
    from loraplex.server.tenancy.keys_file import parse_keys

    text = only(rendered["keys"], "Secret")["stringData"]["keys.yaml"]
    assert yaml.safe_load(text) == yaml.safe_load(VALUES["keys"]["keys"]["inline"])
    assert len(parse_keys(text)) == 1
    assert "--no-auth" not in container(rendered["keys"])["args"]
    assert "Authorization" in notes(VALUES["keys"])


def test_without_keys_the_operator_is_told() -> None:
    assert "--no-auth" in container(render({}))["args"]
    assert "asks nobody for a key" in notes({})
    assert "asks nobody for a key" not in notes(VALUES["keys"])


def test_a_volume_for_each_replica_keeps_the_state_too(rendered: dict[str, list[Manifest]]) -> None:
    mounts = {mount["mountPath"]: mount for mount in container(rendered["statefulset"])["volumeMounts"]}
    assert mounts["/state"]["name"] == mounts["/adapters"]["name"] == "adapters"
    assert mounts["/state"]["subPath"] != mounts["/adapters"]["subPath"]
    told = parse_command_line(container(rendered["statefulset"])["args"])
    assert [str(told[kept]).split("/")[1] for kept in ("state_dir", "download_dir")] == ["state", "state"]
    (claim,) = workload(rendered["statefulset"])["spec"]["volumeClaimTemplates"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "100Gi"}},
    }
    headless = workload(rendered["statefulset"])["spec"]["serviceName"]
    services = {each["metadata"]["name"]: each for each in rendered["statefulset"] if each["kind"] == "Service"}
    assert services[headless]["spec"]["clusterIP"] == "None"


def test_a_volume_of_one_node_is_not_waited_for_twice(rendered: dict[str, list[Manifest]]) -> None:
    assert workload(rendered["shared-claim"])["spec"]["strategy"] == {"type": "Recreate"}
    assert "strategy" not in workload(rendered["default"])["spec"]


def test_the_image_follows_the_device(rendered: dict[str, list[Manifest]]) -> None:
    assert container(rendered["default"])["image"] == "loraplex:0.1.0"
    assert container(rendered["gpu"])["image"] == "loraplex:0.1.0-cuda"
    assert container(rendered["everything"])["image"] == "registry.example.com/loraplex:0.1.0-cuda"
    assert container(rendered["gpu"])["resources"]["limits"] == {"cpu": "16", "memory": "32Gi", "nvidia.com/gpu": 1}
    assert "--device=cuda" in container(rendered["gpu"])["args"]


@pytest.mark.parametrize(
    ("base", "label"),
    [
        ({"model": "demo"}, "demo"),
        ({"model": "Qwen/Qwen3-8B"}, "Qwen3-8B"),
        ({"model": "/models/llama-3/"}, "llama-3"),
        ({"model": "demo", "servedNames": ["first", "second"]}, "first"),
        ({"model": "org/" + "x" * 62 + "-y"}, "x" * 62),
        ({"model": "demo", "servedNames": ["_a b_"]}, "a"),
    ],
)
def test_labels_of_the_ecosystem(base: dict[str, Any], label: str) -> None:
    labels = workload(render({"base": base}))["spec"]["template"]["metadata"]["labels"]
    found = {key: labels[key] for key in labels if "/" not in key or "aibrix" in key}
    assert found == {
        "model": label,
        "model.aibrix.ai/name": label,
        "model.aibrix.ai/port": "8000",
        "adapter.model.aibrix.ai/enabled": "true",
    }


def test_the_chart_is_of_this_version() -> None:
    import tomllib

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    version = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert chart["appVersion"] == version
