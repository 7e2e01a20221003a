"""Which folder may import which: read from the sources, so that nothing has to run and no import hides in a function.

    command -> http -> api -> text, catalog, tenancy, telemetry -> engine -> adapters -> kernels
                                                            engine/step -> models -> kernels

`violations` is the law; its own tests below break each article once.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("server", "kernels", "adapters", "benchmarks")

LEAVES = (
    *("server.options", "server.config", "server.config_access", "server.config_adapters", "server.config_engine"),
    *("server.facts", "server.version", "server.whole_file", "server.drain", "server.address_space"),
)
"""Files of server/ itself that folders below it use."""

LOW = ("adapters.errors", "adapters.front", "adapters.positions", "adapters.throttle", "adapters.shared_work")
MIDDLE = ("server.text", "server.catalog", "server.tenancy", "server.telemetry")

# What the files of a folder may import of ours; all below a name is meant. The longest name counts.
LAW: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "adapters": ("adapters", "kernels"),
    "adapters.files": ("adapters.files", *LOW),
    "adapters.image": ("adapters.image", *LOW, "kernels"),
    "adapters.format": ("adapters.format", "adapters.image", "adapters.files", *LOW, "kernels"),
    "adapters.sources": ("adapters.sources", "adapters.format", "adapters.files", *LOW),
    "server": (*LEAVES, "server.engine.request", "server.models.demo", "server.models.gguf", "adapters.sources"),
    "server.models": ("server.models", "server.whole_file", "kernels"),
    "server.engine": ("server.engine", "adapters"),
    "server.engine.policy": ("server.engine.policy", "server.engine.request", "adapters"),
    "server.engine.step": ("server.engine", "server.models", "adapters", "kernels"),
    "server.text": ("server.text", "server.engine.request", "adapters"),
    "server.catalog": ("server.catalog", "server.engine.request", "adapters", *LEAVES),
    "server.tenancy": ("server.tenancy", "server.engine.request", "adapters", *LEAVES),
    "server.telemetry": ("server.telemetry", "server.engine", "adapters", *LEAVES),
    "server.proof": ("server.proof", *MIDDLE, "server.engine", "adapters", *LEAVES),
    "server.api": ("server.api", *MIDDLE, "server.proof", "server.engine", "adapters", *LEAVES),
    "server.http": ("server.http", "server.api", "server.startup", *LEAVES),
    "server.command": PARTS,
    "benchmarks": PARTS,
}

TORCH_FREE = (
    *("server.engine.policy", "server.text", "server.catalog", "server.tenancy", "server.telemetry", "server.http"),
    *("server.engine.engine", "server.engine.request", "server.engine.stats", "server.engine.streams"),
    *("adapters.files", "adapters.sources", *LEAVES, "server.startup"),
)
"""Policy: no torch, by whatever road, so that it can be tested in microseconds and read without tensors in mind."""


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute; of ours without the leading "loraplex."
    line: int
    scope: str  # "module": runs on import; "function": runs later; "typing": under TYPE_CHECKING, never runs
    ours: bool


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def is_torch_free(module: str) -> bool:
    return any(is_under(module, name) for name in TORCH_FREE)


def module_of(path: str) -> str:
    """server/engine/request.py -> server.engine.request"""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def read_imports(path: str, source: str, modules: frozenset[str]) -> list[Import]:
    """Every import in a file, wherever it stands. `modules` are ours: they tell a submodule from a name."""

    def found(name: str, node: ast.AST, scope: str) -> Import:
        ours = is_under(name, "loraplex")
        return Import(name.removeprefix("loraplex").lstrip(".") if ours else name, node.lineno, scope, ours)

    def named(node: ast.ImportFrom) -> Iterator[str]:
        package = ["loraplex", *module_of(path).split(".")]
        base = package[: len(package) - node.level] if node.level else []
        origin = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{origin}.{alias.name}"
            inside = full.removeprefix("loraplex.")
            yield full if any(is_under(module, inside) for module in modules) else origin

    def walk(node: ast.AST, scope: str) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (found(alias.name, node, scope) for alias in node.names)
            case ast.ImportFrom():
                yield from (found(name, node, scope) for name in dict.fromkeys(named(node)))
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(target)), *_]
            ):
                if name in ("import_module", "__import__"):
                    yield found(target, node, scope)
            case ast.If(test=ast.Name(id=name) | ast.Attribute(attr=name)) if name == "TYPE_CHECKING":
                yield from (entry for child in node.body for entry in walk(child, "typing"))
                yield from (entry for child in node.orelse for entry in walk(child, scope))
                return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            scope = "function"
        yield from (entry for child in ast.iter_child_nodes(node) for entry in walk(child, scope))

    return list(walk(ast.parse(source), "module"))


def roads_to_torch(imports: Mapping[str, list[Import]]) -> dict[str, list[str]]:
    """Find for each module that loads torch when it is imported one of its shortest roads: [module, ..., "torch"]."""
    importers: dict[str, list[str]] = {}
    for module, entries in imports.items():
        for entry in entries:
            if entry.scope == "module":
                importers.setdefault(entry.module if entry.ours else entry.module.split(".")[0], []).append(module)
    roads, reached = {}, [["torch"]]
    for road in reached:
        for module in importers.get(road[0], []):
            if module not in roads:
                roads[module] = [module, *road]
                reached.append(roads[module])
    return roads


def violations(files: Mapping[str, str]) -> list[str]:
    """What in `files` (path -> source) breaks the law, a line each."""
    modules = frozenset(map(module_of, files))
    imports = {module_of(path): read_imports(path, source, modules) for path, source in files.items()}
    roads = roads_to_torch(imports)
    broken = []
    for path in files:
        module = module_of(path)
        folder = max((name for name in LAW if is_under(module.rpartition(".")[0], name)), key=len, default=None)
        if folder is None:
            broken.append(f"{path}: its folder is not in LAW")
            continue
        for entry in imports[module]:
            reasons = [*breaks_folders(module, entry, LAW[folder]), *breaks_libraries(module, entry, roads)]
            broken += [f"{path}:{entry.line}: {reason}" for reason in reasons]
        if is_torch_free(module) and module in roads:
            broken.append(f"{path}: loads torch: {' -> '.join(roads[module])}")
    return broken


def breaks_folders(module: str, entry: Import, allowed: tuple[str, ...]) -> Iterator[str]:
    if not entry.ours:
        if entry.module.split(".")[0] in PARTS:
            yield f"imports {entry.module}; ours is loraplex.{entry.module}, the bare name is somebody else's"
    elif not any(is_under(entry.module, prefix) for prefix in allowed):
        yield f"imports loraplex.{entry.module}, which is not below it"


def breaks_libraries(module: str, entry: Import, roads: Mapping[str, list[str]]) -> Iterator[str]:
    if entry.ours:
        if is_torch_free(module) and entry.scope == "function" and entry.module in roads:
            yield f"imports loraplex.{entry.module} in a function, which loads torch"
    elif is_under(entry.module, "triton"):
        if not (is_under(module, "kernels.gpu") or is_under(module, "benchmarks.kernels")):
            yield "imports triton outside kernels/gpu"
    elif is_under(entry.module, "transformers"):
        if entry.scope == "module":
            yield "imports transformers when it is itself imported; do it in the function that needs it"
    elif is_under(entry.module, "torch") and (is_torch_free(module) or is_under(module, "server.api")):
        yield "imports torch, and is free of it"


def circles(files: Mapping[str, str]) -> list[str]:
    """Find modules that import each other, by whatever road and in whatever scope but for types alone: a line each."""
    modules = frozenset(map(module_of, files))
    below = {
        module_of(path): sorted(
            {entry.module for entry in read_imports(path, source, modules) if entry.ours and entry.scope != "typing"}
        )
        for path, source in files.items()
    }
    found, done = [], set()

    def visit(module: str, road: tuple[str, ...]) -> None:
        if module in road:
            found.append(" -> ".join((*road[road.index(module) :], module)))
        elif module not in done:
            for other in below.get(module, []):
                visit(other, (*road, module))
            done.add(module)

    for module in below:
        visit(module, ())
    return found


def our_files() -> dict[str, str]:
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_every_import_goes_the_one_way() -> None:
    assert "\n".join(violations(our_files())) == ""


def test_no_modules_import_each_other() -> None:
    assert "\n".join(circles(our_files())) == ""


def test_names_in_the_law_exist() -> None:
    modules = set(map(module_of, our_files()))
    folders = {module.rpartition(".")[0] for module in modules}
    named = {*LAW, *TORCH_FREE, *(name for names in LAW.values() for name in names)}
    assert named - modules - folders - set(PARTS) == set()


def test_bare_names_are_imported_nowhere_in_the_repo() -> None:
    """Tests and examples too: `import kernels` would find this folder or, worse, the package of that name on PyPI."""
    bare = []
    for folder in ("tests", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            entries = read_imports(f"{folder}/x.py", path.read_text(encoding="utf-8"), frozenset())
            bare += [
                f"{path}:{entry.line}" for entry in entries if not entry.ours and entry.module.split(".")[0] in PARTS
            ]
    assert bare == []


def test_torch_free_folders_run_without_torch() -> None:
    """What the reading of sources says, seen from outside; third parties that load torch would show here too."""
    modules = [
        module for module in map(module_of, our_files()) if is_torch_free(module) or is_under(module, "server.api")
    ]
    script = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module("loraplex." + name)
    assert "torch" not in sys.modules and "transformers" not in sys.modules, name
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# ---- the law itself -------------------------------------------------------------------------------------------------

TREE = {
    "kernels/records.py": "import torch",
    "kernels/ops.py": "from loraplex.kernels.records import Projection",
    "kernels/gpu/bgmv.py": "import triton",
    "adapters/tiers/pages.py": "import math",
    "adapters/image/tiles.py": "from loraplex.kernels import records",
    "server/models/decoder.py": "from loraplex.kernels.ops import Backend",
    "server/engine/request.py": "from loraplex.adapters.tiers.pages import PagePool",
    "server/engine/policy/plan.py": "from loraplex.server.engine.request import GenerationRequest",
    "server/engine/step/batch.py": "from loraplex.server.models import decoder",
    "server/api/openai/chat.py": "from loraplex.server.engine.request import GenerationRequest",
    "server/config.py": "import os",
    "server/command/app.py": "from loraplex.server.models.decoder import Decoder\ndef load():\n    import transformers",
}


def test_lawful_tree_passes() -> None:
    assert violations(TREE) == []
    assert circles(TREE) == []


def test_a_circle_is_found_where_an_import_hides_in_a_function() -> None:
    late = "def late():\n    from loraplex.server.models.decoder import Decoder"
    assert circles(
        {**TREE, "kernels/ops.py": late, "kernels/gpu/bgmv.py": "if TYPE_CHECKING:\n    import loraplex.kernels.ops"}
    ) == ["kernels.ops -> server.models.decoder -> kernels.ops"]


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("kernels/ops.py", "import loraplex.adapters.tiers.pages", "not below"),
        ("adapters/image/tiles.py", "from loraplex.adapters.tiers.pages import PagePool", "not below"),
        ("adapters/image/tiles.py", "from ...kernels.cpu import backend\nfrom ..tiers import pages", "not below"),
        ("adapters/image/tiles.py", "from loraplex import server", "not below"),
        ("server/models/decoder.py", "from loraplex.adapters.tiers.pages import PagePool", "not below"),
        ("server/models/decoder.py", "from loraplex.server.engine.step.batch import build", "not below"),
        ("server/models/decoder.py", "def late():\n    from loraplex.server.engine.step import batch", "not below"),
        (
            "server/models/decoder.py",
            "if TYPE_CHECKING:\n    from loraplex.server.engine.step import batch",
            "not below",
        ),
        ("server/engine/policy/plan.py", "from loraplex.server.engine.step import batch", "not below"),
        ("server/engine/step/batch.py", "import loraplex.server.api.openai.chat", "not below"),
        (
            "server/engine/step/batch.py",
            "import importlib\nimportlib.import_module('loraplex.server.api')",
            "not below",
        ),
        ("server/api/openai/chat.py", "from loraplex.kernels.records import Projection", "not below"),
        ("server/api/openai/chat.py", "from loraplex.server.models import decoder", "not below"),
        ("server/api/openai/chat.py", "from loraplex.server.command.app import create_app", "not below"),
        ("server/engine/step/batch.py", "import kernels", "somebody else's"),
        ("server/engine/step/batch.py", "from adapters.tiers.pages import PagePool", "somebody else's"),
        ("server/engine/step/batch.py", "import triton.language as tl", "triton"),
        ("kernels/ops.py", "def late():\n    import triton", "triton"),
        ("server/command/app.py", "from transformers import AutoConfig", "transformers"),
        ("server/command/app.py", "class C:\n    import transformers", "transformers"),
        ("server/command/app.py", "try:\n    import transformers\nexcept ImportError:\n    pass", "transformers"),
        ("server/api/openai/chat.py", "def late():\n    import torch", "torch"),
        ("server/api/openai/chat.py", "if TYPE_CHECKING:\n    from torch import Tensor", "torch"),
        ("server/engine/policy/plan.py", "import torch.nn", "torch"),
        (
            "server/engine/policy/plan.py",
            "from loraplex.adapters.image import tiles",
            "adapters.image.tiles -> kernels.records",
        ),
        ("server/engine/policy/plan.py", "def late():\n    from loraplex.adapters.image import tiles", "loads torch"),
        ("surprise/thing.py", "", "not in LAW"),
    ],
)
def test_each_article_can_be_broken(path: str, source: str, reason: str) -> None:
    broken = violations({**TREE, path: source})
    assert broken
    assert all(path in line or "loads torch" in line for line in broken)
    assert reason in "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/command/app.py", "if TYPE_CHECKING:\n    from transformers import PretrainedConfig"),
        ("server/command/app.py", "from loraplex.server.command.cli import main"),
        (
            "server/engine/policy/plan.py",
            "if TYPE_CHECKING:\n    from loraplex.adapters.image.tiles import AdapterImage",
        ),
        ("server/api/openai/chat.py", "import torchmetrics_is_not_torch"),
    ],
)
def test_what_looks_like_a_breach_and_is_none(path: str, source: str) -> None:
    assert violations({**TREE, path: source}) == []
