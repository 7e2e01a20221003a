"""What is installed is what is here: the hand-written package list, the namespace, the pins, the wheel, the text."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.waiting import LIMIT

ROOT = Path(__file__).parent.parent
PARTS = ("server", "kernels", "adapters", "benchmarks")
PAGE = "loraplex/server/api/page/static"


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with_code() -> set[str]:
    """loraplex.server.engine for server/engine, and so on."""
    folders = {path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")}
    return {".".join(("loraplex", *folder.parts)) for folder in folders}


def modules() -> list[str]:
    """Every module of ours but the Triton kernels, which need triton to be there."""
    paths = [path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")]
    return sorted(".".join(("loraplex", *path.with_suffix("").parts)) for path in paths if path.parts[1] != "gpu")


# ---- packages -------------------------------------------------------------------------------------------------------


def test_package_list_is_every_folder_with_code(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders_with_code())  # the list by hand is the one in pyproject.toml


def test_every_part_is_mapped_to_its_folder(pyproject: dict[str, Any]) -> None:
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    parts = {name.split(".")[1] for name in pyproject["tool"]["setuptools"]["packages"]}
    assert mapped == {f"loraplex.{part}": part for part in parts}


def test_no_init_files() -> None:
    """A folder here with an __init__.py would be importable by its bare name, which is another project's on PyPI."""
    assert [str(path) for part in PARTS for path in (ROOT / part).rglob("__init__.py")] == []


def test_importing_everything_creates_no_bare_module(tmp_path: Path) -> None:
    script = f"""
import importlib, sys
for name in {modules()!r}:
    importlib.import_module(name)
ours = {str(ROOT)!r}
for name in {PARTS!r}:
    module = sys.modules.get(name)
    where = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", []))]
    assert not any(place.startswith(ours + "/" + name) for place in where), (name, where)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_console_script_is_installed_and_answers(pyproject: dict[str, Any], tmp_path: Path) -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="loraplex")
    assert script.value == pyproject["project"]["scripts"]["loraplex"]
    command = Path(sys.executable).with_name("loraplex")
    result = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "serve" in result.stdout


def test_version_is_the_one_in_pyproject_and_the_changelog(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert importlib.metadata.version("loraplex") == version
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---- pins -----------------------------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*]+", str(requirement.specifier)) for requirement in requirements)
    return {canonicalize_name(each.name): Version(str(each.specifier).removeprefix("==")) for each in requirements}


def requirements(pyproject: dict[str, Any]) -> Iterator[Requirement]:
    project = pyproject["project"]
    groups = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        pyproject["build-system"]["requires"],
    ]
    return (Requirement(line) for group in groups for line in group)


def test_every_requirement_is_pinned_inside_its_range(pyproject: dict[str, Any]) -> None:
    pinned = pins()
    for requirement in requirements(pyproject):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{requirement} does not hold {pinned[name]}"


NOT_INSTALLED = {"gcsfs"}
"""Of extras that the development environment leaves out: gs:// is tested without its client."""


def test_what_the_requirements_require_is_pinned_too(pyproject: dict[str, Any]) -> None:
    """Walks the installed metadata, as pip would: an unpinned dependency of a dependency breaks builds just as well."""
    pinned, waiting, seen = pins(), list(requirements(pyproject)), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        assert name in pinned, f"{name} is not in constraints.txt"
        extras = requirement.extras or {""}
        if name in NOT_INSTALLED:
            continue
        for line in importlib.metadata.requires(name) or []:
            below = Requirement(line)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(below)
    assert {"torch", "pydantic-core", "starlette"} <= seen


def test_torch_is_pinned_and_its_range_is_open(pyproject: dict[str, Any]) -> None:
    assert pins()["torch"] == Version("2.13.0")
    (torch,) = (each for each in requirements(pyproject) if each.name == "torch")
    assert {clause.operator for clause in torch.specifier} == {">="}


def test_demo_package_is_pinned_as_its_error_says() -> None:
    from loraplex.server.models import demo

    assert demo.INSTALL.endswith(f"{demo.PACKAGE}=={pins()[canonicalize_name(demo.PACKAGE)]}")


# ---- the wheel ------------------------------------------------------------------------------------------------------


def test_wheel_holds_every_module_and_nothing_else(pyproject: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools leaves build folders where it works
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for part in PARTS:
        if (ROOT / part).exists():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run(
        [*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert result.returncode == 0, result.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"loraplex-{pyproject['project']['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"loraplex", info}
    assert f"{info}/licenses/LICENSE" in names
    code = {name for name in names if name.endswith(".py")}
    expected = {path.relative_to(ROOT).as_posix() for part in PARTS for path in (ROOT / part).rglob("*.py")}
    assert code == {f"loraplex/{path}" for path in expected}
    page = {f"{PAGE}/{path.name}" for path in (ROOT / "server" / "api" / "page" / "static").iterdir()}
    assert page == {name for name in names if name.startswith(f"{PAGE}/")}
    assert "loraplex/benchmarks/results/steps.json" in names  # `loraplex bench simulate` without a file of one's own


# ---- the text -------------------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home/\w+|Users/\w+)/")


def text_files() -> list[Path]:
    """What git tracks or would track, but the tests: they may name such paths to be refused."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.split("\0") if name and not name.startswith("tests/")]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def test_no_path_of_somebodys_machine() -> None:
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("see /work/main/x.py", True),
        ('path = "/tmp/cache"', True),
        ("/home/anna/model", True),
        ("https://example.org/work/of/art", False),
        ("$HOME/work/x", False),
        ("~/work/x", False),
        ("a network / a tmp / a root", False),
    ],
)
def test_machine_paths_are_told_from_others(line: str, expected: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == expected
