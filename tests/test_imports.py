"""Which part may import which: read from the sources, so that nothing has to run and no import can hide in a function.

    server/api -> server/engine -> server/models -> kernels
    server/api, server/engine -> adapters -> kernels/metadata, hugepages, hashing, packing

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

# What each layer may import of ours, longest prefix first. Everything under a name is meant.
SHARED = (
    "server.config",
    "server.engine_metrics",
    "server.metrics",
    "server.occasional",
    "server.tenants",
    "server.keys_file",
    "server.access",
    "server.rate_limits",
    "server.recent",
    "server.drain",
    "server.exchange",
    "server.logs",
    "server.state",
    "server.tracing",
    "server.usage",
    "server.version",
    "server.whole_file",
    "server.guarded_file",
)
EVERYTHING = PARTS
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kernels.metadata", ()),
    ("kernels", ("kernels",)),
    ("adapters", ("adapters", "kernels.metadata", "kernels.hugepages", "kernels.hashing", "kernels.packing")),
    ("server.models", ("server.models", "kernels")),
    ("server.engine", ("server.engine", "server.models", "adapters", "kernels")),
    ("server.api", ("server.api", "server.engine", "adapters", *SHARED)),
    *((name, ("server.engine", "adapters", *SHARED)) for name in SHARED),
    ("server.app", EVERYTHING),  # the four that put the parts together
    ("server.launch", EVERYTHING),
    ("server.cli", EVERYTHING),
    *(
        (f"server.{name}", EVERYTHING)
        for name in ("greeting", "startup", "listening", "connections", "protocol", "bounds", "refused")
    ),
    *((f"server.{name}", EVERYTHING) for name in ("option_groups", "engine_options", "serve_options")),
    ("server.selfcheck", EVERYTHING),
    ("benchmarks", EVERYTHING),
)
COMPOSERS = ("server.app", "server.launch", "server.cli", "server.selfcheck", "benchmarks.api.inside")

# Policy: no torch, by whatever road, so that it can be tested in microseconds and read without tensors in mind.
TORCH_FREE = frozenset(
    [f"server.engine.{name}" for name in ("scheduler", "sequence", "request", "kv_cache", "tokenizer", "detokenizer")]
    + [
        f"server.engine.{name}"
        for name in ("plan", "fair_queue", "running", "admission", "lookahead", "door", "chunks", "budget")
    ]
    + [f"server.engine.{name}" for name in ("engine", "streams", "stats", "prefix_cache", "grammar", "schema_ends")]
    + [f"server.engine.{name}" for name in ("chat_template", "tokenizers", "template_process", "template_child")]
    + ["server.engine.address_space"]
    + [f"server.{name}" for name in ("tenants", "keys_file", "access", "rate_limits")]
    + [
        f"server.{name}"
        for name in ("drain", "exchange", "logs", "state", "tracing", "usage", "whole_file", "guarded_file")
    ]
    + [
        "server.engine.holdings",
        "server.engine.on_demand",
        "server.engine.page_map",
        "server.recent",
        "adapters.beneath",
        "adapters.bounded_json",
        "adapters.bounded_yaml",
        "adapters.merge_plan",
        "adapters.merge_folder",
        "adapters.patterns",
        "adapters.peft_config",
    ]
    + [f"adapters.{name}" for name in ("pages", "eviction", "registry", "errors", "refusals", "tokenizer_files")]
    + [f"adapters.{name}" for name in ("addresses", "archive", "download_cache", "downloads", "fetch", "http_client")]
    + [f"adapters.{name}" for name in ("hub", "object_stores", "remote", "watch", "web_files")]
    + [f"server.engine.{name}" for name in ("adapter_list", "adapter_manager", "arrivals", "follower")]
    + [f"adapters.{name}" for name in ("load_queue", "loader", "pace", "settle", "sources", "durations", "workspace")]
)


@dataclass(frozen=True)
class Import:
    module: str  # dotted, absolute; of ours without the leading "loraplex."
    line: int
    scope: str  # "module": runs on import; "function": runs later; "typing": under TYPE_CHECKING, never runs
    ours: bool


def is_under(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


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


def loads_torch(module: str, imports: Mapping[str, list[Import]], seen: frozenset[str] = frozenset()) -> list[str]:
    """The road from `module` to torch through what runs on import: [module, ..., "torch"]; empty when there is none."""
    for entry in imports.get(module, []):
        if entry.scope != "module" or entry.module in seen:
            continue
        if not entry.ours:
            if is_under(entry.module, "torch"):
                return [module, "torch"]
        elif road := loads_torch(entry.module, imports, seen | {module}):
            return [module, *road]
    return []


def violations(files: Mapping[str, str]) -> list[str]:
    """What in `files` (path -> source) breaks the law, a line each."""
    modules = frozenset(map(module_of, files))
    imports = {module_of(path): read_imports(path, source, modules) for path, source in files.items()}
    broken = []
    for path in files:
        module = module_of(path)
        allowed = next((allowed for prefix, allowed in LAYERS if is_under(module, prefix)), None)
        if allowed is None:
            broken.append(f"{path}: belongs to no layer; add it to LAYERS")
            continue
        for entry in imports[module]:
            reasons = [*breaks_layers(module, entry, allowed), *breaks_libraries(module, entry, imports)]
            broken += [f"{path}:{entry.line}: {reason}" for reason in reasons]
        if module in TORCH_FREE and (road := loads_torch(module, imports)):
            broken.append(f"{path}: loads torch: {' -> '.join(road)}")
    return broken


def breaks_layers(module: str, entry: Import, allowed: tuple[str, ...]) -> Iterator[str]:
    if not entry.ours:
        if entry.module.split(".")[0] in PARTS:
            yield f"imports {entry.module}; ours is loraplex.{entry.module}, the bare name is somebody else's"
    elif not any(is_under(entry.module, prefix) for prefix in allowed):
        yield f"imports loraplex.{entry.module}, which is not below it"
    elif any(is_under(entry.module, prefix) for prefix in COMPOSERS) and module not in COMPOSERS:
        yield f"imports loraplex.{entry.module}, which puts the parts together and belongs to none"


def breaks_libraries(module: str, entry: Import, imports: Mapping[str, list[Import]]) -> Iterator[str]:
    if entry.ours:
        if module in TORCH_FREE and entry.scope == "function" and loads_torch(entry.module, imports):
            yield f"imports loraplex.{entry.module} in a function, which loads torch"
    elif is_under(entry.module, "triton"):
        if not is_under(module, "kernels.gpu"):
            yield "imports triton outside kernels/gpu"
    elif is_under(entry.module, "transformers"):
        if entry.scope == "module":
            yield "imports transformers when it is itself imported; do it in the function that needs it"
    elif is_under(entry.module, "torch") and (module in TORCH_FREE or is_under(module, "server.api")):
        yield "imports torch, and is free of it"


def our_files() -> dict[str, str]:
    paths = [path for part in PARTS for path in (ROOT / part).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def test_every_import_goes_the_one_way() -> None:
    assert "\n".join(violations(our_files())) == ""


def test_torch_free_list_names_files_that_exist() -> None:
    assert set(map(module_of, our_files())) >= TORCH_FREE


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


@pytest.mark.parametrize("module", ["server.api.schemas", *sorted(TORCH_FREE)])
def test_module_runs_without_torch(module: str) -> None:
    """What the reading of sources says, seen from outside; third parties that load torch would show here too."""
    script = f"import sys, loraplex.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---- the law itself -------------------------------------------------------------------------------------------------

TREE = {
    "kernels/metadata.py": "import torch",
    "kernels/backend.py": "from loraplex.kernels.metadata import Site",
    "kernels/gpu/bgmv.py": "import triton",
    "adapters/pages.py": "import math",
    "adapters/tiles.py": "from loraplex.kernels import metadata",
    "server/models/decoder.py": "from loraplex.kernels.backend import Backend",
    "server/engine/request.py": "from loraplex.adapters.pages import PagePool",
    "server/engine/batch.py": "from loraplex.server.models import decoder",
    "server/api/chat.py": "from loraplex.server.engine.request import GenerationRequest",
    "server/config.py": "import os",
    "server/app.py": "from loraplex.server.models.decoder import Decoder\ndef load():\n    import transformers",
}


def test_lawful_tree_passes() -> None:
    assert violations(TREE) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("kernels/metadata.py", "from loraplex.kernels import backend", "not below"),
        ("kernels/backend.py", "import loraplex.adapters.pages", "not below"),
        ("adapters/tiles.py", "from loraplex.kernels.backend import Backend", "not below"),
        ("adapters/tiles.py", "from ..kernels import backend", "not below"),
        ("adapters/tiles.py", "from loraplex import server", "not below"),
        ("server/models/decoder.py", "from loraplex.adapters.pages import PagePool", "not below"),
        ("server/models/decoder.py", "from loraplex.server.engine.batch import build", "not below"),
        ("server/models/decoder.py", "def late():\n    from loraplex.server.engine import batch", "not below"),
        ("server/models/decoder.py", "if TYPE_CHECKING:\n    from loraplex.server.engine import batch", "not below"),
        ("server/engine/batch.py", "import loraplex.server.api.chat", "not below"),
        ("server/engine/batch.py", "import importlib\nimportlib.import_module('loraplex.server.api')", "not below"),
        ("server/api/chat.py", "from loraplex.server.models import decoder", "not below"),
        ("server/api/chat.py", "from loraplex.kernels.metadata import Site", "not below"),
        ("server/api/chat.py", "from loraplex.server.app import create_app", "not below"),
        ("benchmarks/load.py", "from loraplex.server.app import create_app", "puts the parts together"),
        ("server/engine/batch.py", "import kernels", "somebody else's"),
        ("server/engine/batch.py", "from adapters.pages import PagePool", "somebody else's"),
        ("server/engine/batch.py", "import triton.language as tl", "triton"),
        ("kernels/backend.py", "def late():\n    import triton", "triton"),
        ("server/app.py", "from transformers import AutoConfig", "transformers"),
        ("server/app.py", "class C:\n    import transformers", "transformers"),
        ("server/app.py", "try:\n    import transformers\nexcept ImportError:\n    pass", "transformers"),
        ("server/api/chat.py", "def late():\n    import torch", "torch"),
        ("server/api/chat.py", "if TYPE_CHECKING:\n    from torch import Tensor", "torch"),
        ("adapters/pages.py", "import torch.nn", "torch"),
        ("adapters/pages.py", "from loraplex.kernels.metadata import Site", "loads torch"),
        (
            "adapters/pages.py",
            "from loraplex.adapters.tiles import pack",
            "adapters.tiles -> kernels.metadata",
        ),
        ("adapters/pages.py", "def late():\n    from loraplex.adapters import tiles", "loads torch"),
        ("server/surprise.py", "", "no layer"),
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
        ("server/app.py", "if TYPE_CHECKING:\n    from transformers import PretrainedConfig"),
        ("server/app.py", "from loraplex.server.cli import main"),
        ("adapters/pages.py", "if TYPE_CHECKING:\n    from loraplex.adapters.tiles import AdapterImage"),
        (
            "server/api/chat.py",
            "from loraplex.server.engine import batch",
        ),  # batch may load torch, chat may not name it
        ("server/api/chat.py", "import torchmetrics_is_not_torch"),
    ],
)
def test_what_looks_like_a_breach_and_is_none(path: str, source: str) -> None:
    assert violations({**TREE, path: source}) == []
