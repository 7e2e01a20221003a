"""YAML files as PyYAML reads them, small and large; and what would stop or end the process, told in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import yaml

from loraplex.adapters.files import bounded_yaml
from loraplex.adapters.files.bounded_yaml import MAX_BYTES, SMALL_BYTES, parse_yaml

PADDING = "\n#" + "x" * SMALL_BYTES  # a small file becomes a large one

ENTRIES = """
defaults: &usual {weight: 2, base: false}
keys:
  - {<<: *usual, name: one, adapters: ["a/*", 'b'], text: "é\\n", none: null, 'yes': true, number: 0x10, float: 1.5}
  - <<: [*usual]
    name: two
empty: []
flat: [1, two, [3]]
nothing:
"""


@pytest.fixture(params=["small", "large"])
def padding(request: pytest.FixtureRequest) -> str:
    """Both ways: in this process and in another."""
    return "" if request.param == "small" else PADDING


@pytest.mark.parametrize("text", [ENTRIES, "", "# nothing", "a: 1", "---\na: {b: {c: [x]}}\n"])
def test_files_say_what_pyyaml_says(text: str, padding: str) -> None:
    assert (parse_yaml((text + padding).encode()) or None) == yaml.safe_load(text)


def chained(start: str, link: str) -> str:
    """Nine lines, each of which stands for ten of the one before."""
    lines = [f"a: &a {start}"]
    for one, other in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{other}: &{other} {link.replace('LINKS', ','.join([f'*{one}'] * 10))}")
    return "\n".join(lines)


BAD: list[tuple[str, str]] = [
    (chained("[x,x,x]", "[LINKS]"), "aliases written out"),  # 3 GB of text as it is shown
    (chained("{k: 1}", "{<<: [LINKS]}"), "aliases written out"),
    ("a: &a [*a]", "holds itself"),
    ("a: &a {b: *a}", "holds itself"),
    ("a: " + "[" * 20_000 + "]" * 12_000, "nested too deeply|not YAML"),
    ("a: " + "1" * 20_000, "limit"),
    ("a: !!bool x", "does not fit"),
    ("a: !!timestamp x", "does not fit"),
    ("a: !!python/object/apply:os.system [hunter2]", "not YAML at line 1"),
    ("a: 1\nb: [hunter2", "not YAML"),
    ("a: *hunter2", "not YAML"),
    ("a: 1\n---\nhunter2: 2", "not YAML"),
]


@pytest.mark.parametrize(("text", "told"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_read_is_told(text: str, told: str, padding: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse_yaml((text + padding).encode())
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_ends_libyaml_ends_another_process() -> None:
    """Its loader goes down with what is nested, in C, as far as the stack goes."""
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_yaml(b"a: " + b"[" * 1_000_000)


def test_large_ones_are_mappings_of_what_json_has() -> None:
    for text, told in (("[1]", "it is a list"), ("a: 2001-01-01", "dates"), ("a: .nan", "JSON"), ("a: \xff", "")):
        data = text.encode("latin-1") + PADDING.encode()
        with pytest.raises(ValueError, match=told or "UTF-8"):
            parse_yaml(data)


def test_files_of_any_size_are_not_read() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_BYTES} bytes"):
        parse_yaml(b"#" * (MAX_BYTES + 1))


def test_one_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_yaml, "SECONDS", 0.001)
    with pytest.raises(ValueError, match="cannot be read within"):
        parse_yaml(PADDING.encode())


def test_large_files_are_read_elsewhere_and_taken_in_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of this process sees more than an entry: what is one call holds the GIL from its start to its end."""
    seen: list[int] = []
    real = bounded_yaml.parse_json

    def parse(data: bytes, *bounds: int) -> Any:
        seen.append(len(data))
        return real(data, *bounds)

    def none(*_: object) -> None:
        raise AssertionError("read in this process")

    text = "keys:\n" + "".join(f"  - {{name: k{i}, adapters: [a, b]}}\n" for i in range(2000))
    expected = yaml.safe_load(text)
    monkeypatch.setattr(bounded_yaml, "parse_json", parse)
    monkeypatch.setattr(bounded_yaml, "_load", none)
    assert parse_yaml(text.encode()) == expected
    assert len(seen) > 2000
    assert max(seen) < 200


def test_the_other_process_reads_no_torch() -> None:
    script = "import sys, loraplex.adapters.files.bounded_yaml; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
