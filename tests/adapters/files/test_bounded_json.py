"""Strangers' JSON and patterns: what is too much is refused before it costs anything, and told without its content."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files import bounded_json, patterns
from loraplex.adapters.files.bounded_json import parse_json
from loraplex.adapters.format import adapter_files
from loraplex.adapters.format.header import MAX_DIMENSION, parse_header
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.adapters.tiers.reader import AdapterReader
from loraplex.kernels.records import Projection
from loraplex.server.models.config import Site
from tests.support.adapter_reading import without_weights, write_adapter
from tests.support.refusals import refused

LAYOUT = BaseLayout("tiny-base", 2, (Projection("self_attn.q_proj", Site.QKV, 32, 0, 32, False),), 1024, torch.float32)
SECRET = "hunter2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql", LAYOUT)


def refusal(folder: Path) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        AdapterReader(without_weights(LAYOUT), 1000).examine(str(folder))
    return caught.value


def write_header(folder: Path, header: bytes, data: int = 64) -> None:
    (folder / adapter_files.WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


def tensor(shape: str, name: str = "a") -> str:
    return f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,64]}}}}'


@pytest.mark.parametrize(
    "header",
    [
        tensor("[" + ",".join(["9" * 20] * 80_000) + "]"),  # froze the server for 32 s
        "{" + ",".join(f'"{i}":{{}}' for i in range(700_000)) + "}",  # 3.7 s
        "[" + "[]," * (20 << 20) + "[]]",  # 12 s
        "[" + "[]," * 40_000 + "[]]",  # within the bytes, not within the values
        '{"a":1' + ',"a":1' * 40_000 + "}",
    ],
    ids=["a shape", "tensors", "lists", "short lists", "names"],
)
def test_headers_with_too_much_in_them_are_not_parsed(
    folder: Path, header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_header(folder, header.encode())
    parsed: list[bytes] = []
    real = json.loads
    monkeypatch.setattr(bounded_json.json, "loads", lambda data, **k: (parsed.append(data), real(data, **k))[1])
    assert refusal(folder).code == "bad_file"
    assert [text for text in parsed if "peft_type" not in str(text)] == [], "the config alone"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (tensor(f"[{','.join(['9' * 12] * 60_000)}]"), "a is not described by"),
        (tensor("[4,4,4,4,4]"), "a shape of up to four sizes"),
        (tensor("[9999999999999999999,1]"), "not described"),
        (tensor("[16,1.0]"), "not described"),
        (tensor("[true,16]"), "not described"),
        (tensor("[16,-1]"), "not described"),
        (tensor("16"), "not described"),
        (tensor("[[16]]"), "not described"),
        (tensor("[16]").replace("[0,64]", "[0,64,64]"), "not described"),
        (tensor("[16]").replace("[0,64]", "[false,64]"), "not described"),
        (tensor("[16]").replace("64", "9" * 5000), "a number of 5000 digits"),
        (tensor("[16]").replace("64", "NaN"), "NaN or Infinity"),
        (tensor("[16]")[:-1] + "," + tensor("[16]")[1:], "twice in one object"),
        (tensor("[16]", "n" * 10_000), "name has 10000 characters"),
        (tensor("[16]", "\\ud800"), "matches nothing"),
        ("{" + ",".join(f'"{i}":1' for i in range(5000)) + "}", "has 5000 tensors; an adapter of this base has 4096"),
        ("[" * 60_000, "nested too deeply"),
        ("[1]", "no JSON object"),
        ("", "not JSON at line 1"),
        ("\xff", "not JSON"),
    ],
)
def test_headers_that_describe_no_tensors(
    folder: Path, header: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed of sizes that are none."""

    def prod(shape: tuple[int, ...]) -> Any:
        assert len(shape) <= 4
        assert all(size <= MAX_DIMENSION for size in shape)
        return real(shape)

    real = math.prod
    write_header(folder, header.encode())
    monkeypatch.setattr(math, "prod", prod)
    found = refusal(folder)
    assert told in str(found)
    assert len(str(found)) < 1200
    str(found).encode()


def test_a_large_base_may_have_large_headers() -> None:
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.lora_{f}.weight": {
            "dtype": "BF16",
            "shape": [1, 1],
            "data_offsets": [2 * i, 2 * i + 2],
        }
        for i, (layer, name, f) in enumerate(
            (layer, f"experts.{n}.up_proj", f) for layer in range(40) for n in range(100) for f in "AB"
        )
    }
    header = json.dumps(tensors).encode()
    head = adapter_files.AdapterHead(b"", header, 2 * len(tensors), adapter_files.Stamp((), ()))
    assert len(parse_header(head, 8000)) == 8000
    with refused("bad_file"):
        parse_header(head)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        f"root:{SECRET}:1::\n",
        f'"{SECRET}"',
        f'["{SECRET}"]',
        f'{{"password": "{SECRET}"}}',
        f'{{"peft_type": ["{SECRET}"]}}',
        f'{{"a": "\\{SECRET}"}}',
        f"{SECRET}\xe9",
        SECRET[:3],
    ],
)
def test_files_that_are_no_adapters_are_not_told(folder: Path, name: str, content: str) -> None:
    """A link may have brought anybody's file here: not a byte of it is in the message, however it may be written."""
    data = content.encode("latin-1")
    (folder / name).write_bytes(data)
    message = str(refusal(folder)).removeprefix(str(folder))
    assert SECRET[:3] not in message
    for first in (data[:8], SECRET.encode()):
        told = (first.hex(), first.hex(" "), str(list(first))[1:-1], repr(first)[2:-1])
        told = tuple(text for text in told if text != '{"peft_t')
        numbers = [int.from_bytes(first[:n], order) for n in (8, 4) for order in ("little", "big")]
        for shown in (*told, *map(str, numbers), *map(hex, numbers)):
            assert shown not in message


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"[1,2", "not JSON at line 1, column 5"),
        (b'{"a":\n"\\x"}', "not JSON at line 2"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'"' + bytes(200), "it has 201 bytes"),
        (b"[" * 20, "holds 20 values"),
        (b"1e999999", None),
        (b"-Infinity", "Infinity"),
    ],
)
def test_json_within_bounds(data: bytes, told: str | None) -> None:
    if told is None:
        assert parse_json(data, 100, 10) == math.inf
        return
    with pytest.raises(ValueError, match=told):
        parse_json(data, 100, 10)


def test_what_windows_puts_in_front_of_a_file() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -2.5, null]}', 100, 10) == {"a": [1, -2.5, None]}


# patterns


def with_config(folder: Path, **fields: Any) -> AdapterRefused:
    file = folder / adapter_files.CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return refusal(folder)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("((a|b){1000}){1000}", "repeats written out"),  # 1.6 s to compile; with a third {1000}, all memory
        ("(((((a|b){1000}){1000}){1000}){1000}){1000}", "repeats written out"),
        ("(" * 5000 + ")" * 5000, "nested too deeply"),
        ("|".join(f"a{i}" for i in range(5000)), "characters"),
        ("a{99999999999999999999}", "no number of repeats"),
        ("(?:q_proj){e<=3}", "no number of repeats"),  # regex's own: almost q_proj
        ("(?R)", "not valid"),  # likewise: PEFT's patterns are re's
        (r"\p{L}+", "no number of repeats"),
        (r"\L<names>", "not valid"),
        ("(?V1)[[a-z]--[q]]", "not valid"),
        ("a**", "not valid"),
        ("((.|a)*(a|.)*)*x", "takes too long"),
    ],
)
def test_patterns_that_cost_too_much_or_are_not_peft_s(
    folder: Path, pattern: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.adapters.format.targets.PATTERN_SECONDS", 0.2)
    for key, value in (("target_modules", pattern), ("rank_pattern", {pattern: 4}), ("exclude_modules", pattern)):
        found = with_config(folder, **{key: value})
        if told == "takes too long" and "leave no module" in str(found):
            continue  # it was quick on these names
        assert found.code == "bad_config"
        assert told in str(found)
        write_adapter(folder, LAYOUT)


def test_hundreds_of_patterns_share_one_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be quick; before, only one that took over a millisecond was told that the time was over."""
    now = [0.0]
    monkeypatch.setattr(patterns.time, "thread_time", lambda: now.__setitem__(0, now[0] + 0.01) or now[0])
    found = with_config(folder, rank_pattern={f"a{i}.*": 1 for i in range(3000)})
    assert "takes too long together with the others" in str(found)
    assert now[0] < 3


def test_the_same_pattern_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """regex keeps 500: of more, for module after module, none was found again."""
    compiled: list[str] = []
    real = patterns.regex.compile
    monkeypatch.setattr(patterns.regex, "compile", lambda text, **k: (compiled.append(text), real(text, **k))[1])
    file = folder / adapter_files.CONFIG_FILE
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rank_pattern": {f"x{i}.*": 2 for i in range(600)}}))
    AdapterReader(without_weights(LAYOUT), 1000).examine(str(folder))
    assert len(compiled) == 600


def test_a_layers_pattern_whose_number_is_no_part_of_the_match(folder: Path) -> None:
    found = with_config(folder, layers_to_transform=[0], layers_pattern="model|zz")
    assert "leave no module" in str(found)


def test_patterns_let_others_run() -> None:
    breaths: list[int] = []
    match = patterns.Matcher(2.0, lambda: breaths.append(1))
    assert match.full("target_modules", ".*q_proj", "model.q_proj")
    assert match.end("rank_pattern", "q_proj", "model.q_proj")
    assert not match.end("rank_pattern", "proj", "model.q_proj")
    assert len(breaths) == 3
