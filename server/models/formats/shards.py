"""The safetensors files of one folder: what their headers say, and one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loraplex.server.models.checkpoint import WeightsError

IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that old checkpoints carry and nobody needs: buffers that are computed."""


@dataclass(frozen=True)
class Header:
    """What the header of a file says of one tensor."""

    file: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


class Shards:
    """Read the safetensors files of `folder`, one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """Read the headers alone. Raises WeightsError where a file is missing or damaged."""
        self.folder = folder
        self._headers: dict[str, Header] = {}
        for file in _files(folder):
            self._index(file)

    @property
    def headers(self) -> Mapping[str, Header]:
        """Map the name of every tensor but the IGNORED ones to what its header says."""
        return self._headers

    def read(self, name: str) -> Tensor:
        """Map the tensor `name` from its file, in the file's dtype. The mapping ends with the tensor.

        Raises WeightsError where the file changed meanwhile.
        """
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map several tensors as `read` does, and open each file once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._headers[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with _opened(file) as shard:
                found |= {name: shard.get_tensor(name) for name in wanted}
        return found

    def expect(self, name: str, dtypes: Iterable[str], shape: tuple[int, ...] | None = None) -> Header:
        """Look up the tensor `name`. Raises WeightsError where it is missing, or of another type or shape."""
        header = self._headers.get(name)
        if header is None:
            raise WeightsError(f"{self.folder} lacks tensor {name}, which its quantization_config asks for")
        dtypes = tuple(dtypes)
        if header.dtype not in dtypes:
            raise WeightsError(f"tensor {name} of {header.file} is {header.dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and header.shape != shape:
            raise WeightsError(
                f"tensor {name} of {header.file} has shape {list(header.shape)}, expected {list(shape)} by its "
                "quantization_config"
            )
        return header

    def _index(self, file: Path) -> None:
        """Note the tensors of one file. Opening reads the header only and compares it with the file's length."""
        with _opened(file) as shard:
            for name in shard.keys():  # noqa: SIM118  not a mapping
                if name.endswith(IGNORED):
                    continue
                twin = self._headers.get(name)
                if twin is not None:
                    raise WeightsError(f"tensor {name} is both in {twin.file.name} and in {file.name}")
                view = shard.get_slice(name)
                self._headers[name] = Header(file, view.get_dtype(), tuple(view.get_shape()))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is damaged or cut short: {error}; download it again") from error


def _files(folder: Path) -> Iterator[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        yield single
        return
    if not index.exists():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded: convert it to safetensors" if pickled else ""
        raise WeightsError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{hint}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be read: expected a JSON object with a weight_map ({error})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index} names the shard {name!r}: expected a file of the same folder")
        if not (folder / name).exists():
            raise WeightsError(f"{index} names the shard {name}, which is missing: download it again")
        yield folder / name
