"""YAML files of an operator's, whoever else may write there: read within bounds and without stopping anybody.

libyaml's loader holds the GIL for 0.3 s a MB, and nested deeply enough it ends the process; anchors make gigabytes of a
few lines. Small files are therefore put together by Python's own code, which others may interrupt, and large ones in a
process of its own, which hands over the entries of the file's lists one at a time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from loraplex.adapters.files.bounded_json import parse_json

MAX_BYTES = 4 << 20
"""Of a file: some 15,000 keys, or 40,000 adapters. Reading it takes 200 MiB for a moment, in a process of its own."""

SMALL_BYTES = 32 << 10
"""Read in this process, in some 10 ms."""

MAX_NODES = 1_000_000
"""Of a file, with what anchors stand for wherever they are used; of a small one, as many as it has bytes."""

SECONDS = 30
"""That a large file may take; one of MAX_BYTES takes 3 on a core of its own."""

MEMORY_BYTES = 1 << 30
"""Of addresses, for the process that reads a large one."""

_SCRIPT = "from loraplex.adapters.files.bounded_yaml import main; main()"

_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SteadyLoader: Any = yaml.SafeLoader

if yaml.__with_libyaml__:
    from yaml.cyaml import CParser

    class _EventLoader(Composer, CParser, SafeConstructor, Resolver):  # type: ignore[misc]  # of a package without types
        """libyaml's events, put together by Python."""

        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    _SteadyLoader = _EventLoader


def parse_yaml(data: bytes) -> Any:
    """Parse a file; a large one must be a mapping. Raises ValueError, which shows nothing of the file."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    if len(data) <= SMALL_BYTES:
        return _load(data, _SteadyLoader, len(data))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT], input=data, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"it cannot be read within {SECONDS} s") from None
    if done.returncode:
        raise ValueError("it is nested too deeply, or takes too much memory")
    return _collect(done.stdout)


def main() -> None:
    """Write parse_yaml() of stdin as lines of JSON: [key, value], of a list [key, [entry]] each; or what is wrong."""
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        found = _load(sys.stdin.buffer.read(), _FastLoader, MAX_NODES)
        for line in [] if found is None else _lines(found):
            sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
    except (ValueError, TypeError) as error:  # what JSON does not have, too
        sys.stdout.write(json.dumps(str(error) if isinstance(error, ValueError) else "it holds dates or binary") + "\n")


def _lines(found: Any) -> Iterator[list[Any]]:
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}; expected names with values")
    for key, value in found.items():
        if isinstance(value, list):
            yield [key, []]
            yield from ([key, [each]] for each in value)
        else:
            yield [key, value]


def _collect(output: bytes) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for line in output.splitlines():
        told = parse_json(line, len(line), len(line))
        if isinstance(told, str):
            raise ValueError(told)
        key, value = told
        if isinstance(found.get(key), list):
            found[key] += value
        else:
            found[key] = value
    return found or None


def _load(data: bytes, kind: Any, max_nodes: int) -> Any:
    try:
        loader = kind(data.decode())
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, max_nodes, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ValueError(f"it is not YAML{where}") from None  # the parser's own words quote the file
    except (LookupError, AttributeError, TypeError, ArithmeticError):  # of tags that do not fit their values
        raise ValueError("it is not YAML: a tag does not fit its value") from None


def _count(node: yaml.Node, most: int, known: dict[int, int | None]) -> int:
    """Count nodes, with what aliases stand for. Raises ValueError for more than `most`, or without an end."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("something in it holds itself")
        return count
    known[id(node)] = None
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    flat = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
    count = 1 + sum(_count(each, most, known) for each in flat)
    if count > most:
        raise ValueError(f"with its aliases written out it holds over {most} values")
    known[id(node)] = count
    return count
