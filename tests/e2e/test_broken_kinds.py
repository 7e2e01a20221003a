"""Broken adapters of every kind, made of sound ones: each is refused with its own code and words while streams run."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.kinds import KINDS
from tests.support.adapter_reading import read_adapter
from tests.support.kind_samples import FAMILY, FIELDS, kind_samples
from tests.support.peft_adapters import layout_of, served_base_of
from tests.support.served import Served, serve_tiny
from tests.support.tiny import load_oracle, make_tiny_model, make_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = kind_samples()
TOKENS = 60
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Sound:
    """A sound adapter, before something is done to it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    file: bytes

    @property
    def first(self) -> str:
        """A tensor of floating-point numbers."""
        floats = [name for name, tensor in sorted(self.tensors.items()) if tensor.is_floating_point()]
        return next(name for name in floats if "randlora_A" not in name and "randlora_B" not in name)  # copies, unread

    def with_tensors(self, **changed: Tensor) -> bytes:
        return safetensors.torch.save({**self.tensors, **changed})

    def with_value(self, value: float) -> bytes:
        bad = self.tensors[self.first].clone()
        bad.view(-1)[-1] = value
        return self.with_tensors(**{self.first: bad})

    def with_header(self, change: Callable[[str], str]) -> bytes:
        """The file with another header, whatever then is at its offsets."""
        length = struct.unpack("<Q", self.file[:8])[0]
        header = change(self.file[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(header)) + header + self.file[8 + length :]

    def twice(self, header: str) -> str:
        """The header with its first tensor in it twice."""
        described = json.loads(header)[self.first]
        return f'{{"{self.first}":{json.dumps(described)},{header[1:]}'

    def lying(self, header: str) -> str:
        """The header with a tensor that begins 8 bytes before it does."""
        described = json.loads(header)
        described[self.first]["data_offsets"] = [n + 8 for n in described[self.first]["data_offsets"]]
        return json.dumps(described)


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


Breakage = Callable[[Sound, Path], dict[str, bytes]]
"""(a sound adapter, a file that must never come to be) -> files of the broken one, by name."""


def _weights(make: Callable[[Sound], bytes]) -> Breakage:
    return lambda sound, _: {CONFIG: json.dumps(sound.config).encode(), WEIGHTS: make(sound)}


def _config(change: Callable[[Sound], Any]) -> Breakage:
    return lambda sound, _: {CONFIG: json.dumps({**sound.config, **change(sound)}).encode(), WEIGHTS: sound.file}


def _renamed(sound: Sound, old: str, new: str) -> bytes:
    return safetensors.torch.save({name.replace(old, new): tensor for name, tensor in sound.tensors.items()})


BREAKAGES: dict[str, tuple[Breakage, str, str]] = {  # what is done, the code, and what the words have
    "cut short": (_weights(lambda s: s.file[:-5]), "bad_file", "bytes"),
    "cut in its header": (_weights(lambda s: s.file[:40]), "bad_file", WEIGHTS),
    "empty": (_weights(lambda s: b""), "bad_file", WEIGHTS),
    "without weights": (lambda s, _: {CONFIG: json.dumps(s.config).encode()}, "missing_file", WEIGHTS),
    "without config": (lambda s, _: {WEIGHTS: s.file}, "missing_file", CONFIG),
    "NaN": (_weights(lambda s: s.with_value(float("nan"))), "not_finite", "NaN or infinite"),
    "infinity": (_weights(lambda s: s.with_value(float("inf"))), "not_finite", "NaN or infinite"),
    "of another width": (
        _weights(lambda s: s.with_tensors(**{s.first: torch.cat((s.tensors[s.first],) * 2)})),
        *("shape_mismatch", "has shape"),
    ),
    "of a deeper base": (
        _weights(lambda s: _renamed(s, ".layers.1.", ".layers.7.")),
        *("unmatched_tensor", "the base has 2 layers; the adapter looks made for one of 8"),
    ),
    "of another architecture": (
        _weights(lambda s: _renamed(s, "base_model.model.model.layers.", "base_model.model.transformer.h.")),
        *("unmatched_tensor", "matches nothing in base"),
    ),
    "a tensor more": (
        _weights(lambda s: s.with_tensors(**{"base_model.model.classifier.weight": torch.ones(2)})),
        *("unmatched_tensor", "base_model.model.classifier.weight matches nothing"),
    ),
    "whole numbers": (
        _weights(lambda s: s.with_tensors(**{s.first: torch.zeros(s.tensors[s.first].shape, dtype=torch.int32)})),
        *("bad_file", "I32|int32"),
    ),
    "a name twice": (_weights(lambda s: s.with_header(s.twice)), "bad_file", "twice|duplicate"),
    "a lying header": (_weights(lambda s: s.with_header(s.lying)), "bad_file", "lies at bytes"),
    "an endless header": (_weights(lambda s: struct.pack("<Q", 1 << 60) + s.file[8:]), "bad_file", WEIGHTS),
    "a pickle with code": (
        lambda s, mark: {CONFIG: json.dumps(s.config).encode(), "adapter_model.bin": pickle.dumps(_Bomb(mark))},
        *("missing_file", "safetensors"),
    ),
    "code under another name": (
        lambda s, mark: {CONFIG: json.dumps(s.config).encode(), WEIGHTS: pickle.dumps(_Bomb(mark))},
        *("bad_file", WEIGHTS),
    ),
    "no config": (lambda s, _: {CONFIG: b"{", WEIGHTS: s.file}, "bad_config", "not valid JSON"),
    "a kind nobody has": (_config(lambda s: {"peft_type": "MOONLORA"}), "unsupported_kind", "MOONLORA"),
    "an option nobody knows": (_config(lambda s: {"use_moons": 3}), "unsupported_option", "use_moons is 3"),
    "a target the base lacks": (_config(lambda s: {"target_modules": ["c_attn"]}), "bad_config", "c_attn"),
    "a pattern that is none": (_config(lambda s: {"target_modules": "(", "layers_to_transform": None}),
                               "bad_config", "not valid"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(make_tiny_model(FAMILY, tmp_path_factory.mktemp("base"), **FIELDS))


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("made")
    with serve_tiny(base, load_oracle(base), folder, SAMPLES, loaded=["dora"]) as made:
        yield made


class Streams:
    """Answers of adapters and the base, one after the other in threads, until the block ends: all alike."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._done = threading.Event()
        self._names = ("tiny", "dora")
        self._wanted = {name: served.live.text(name, TOKENS) for name in self._names}
        self._wrong: list[str] = []
        self.count = 0
        self._threads = [threading.Thread(target=self._ask, args=(name,)) for name in self._names]

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        assert not self._wrong

    def _ask(self, name: str) -> None:
        while not self._done.is_set():
            found = self._served.live.text(name, TOKENS)
            self.count += 1
            if found != self._wanted[name]:
                self._wrong.append(name)


def test_every_kind_has_a_sample() -> None:
    assert len({options.get("kind", "LORA") for options in SAMPLES.values()}) >= 23
    assert {options.get("kind", "LORA").lower() for options in SAMPLES.values()} <= KINDS.keys()
    assert len(SAMPLES) * len(BREAKAGES) >= 60


def test_each_is_refused_and_harms_no_stream(base: Path, served: Served, tmp_path: Path) -> None:
    """The reader gives the code, the server a 400 with the same words, and what others are answered stays the same."""
    own = served_base_of(served.oracles["tiny"], layout_of(served.oracles["tiny"]))
    mark = tmp_path / "executed"
    refused: set[tuple[str, str]] = set()
    with Streams(served) as streams:
        for name, (make, code, words) in _broken():
            kind = name.partition(",")[0]
            folder = tmp_path / name.replace(" ", "-")
            folder.mkdir()
            for file, data in make(_sound(served.folders[kind]), mark).items():
                (folder / file).write_bytes(data)
            with pytest.raises(AdapterRefused) as caught:
                read_adapter(folder, own)
            message = str(caught.value)
            assert (caught.value.code, bool(re.search(words, message))) == (code, True), (name, message)
            answer = served.live.load("broken", folder)
            assert answer.status_code == 400, (name, answer.text)
            assert re.search(words, answer.text), (name, answer.text)
            refused.add((kind, code))
    assert streams.count >= 8
    assert len(refused) >= 60, "a broken adapter of each code of each kind, or nearly so"
    assert {kind for kind, _ in refused} == SAMPLES.keys()
    assert not mark.exists()
    assert "broken" not in {card["id"] for card in served.live.ask("GET", "/v1/models").json()["data"]}


def _broken() -> list[tuple[str, tuple[Breakage, str, str]]]:
    """Every third of all pairs of a kind and a breakage: over two hundred, with each kind and each breakage in many."""
    pairs = [(kind, way, i + j) for i, kind in enumerate(SAMPLES) for j, way in enumerate(BREAKAGES)]
    return [(f"{kind}, {way}", BREAKAGES[way]) for kind, way, number in pairs if number % 3 == 0]


def _sound(folder: Path) -> Sound:
    data = (folder / WEIGHTS).read_bytes()
    return Sound(json.loads((folder / CONFIG).read_text()), safetensors.torch.load(data), data)
