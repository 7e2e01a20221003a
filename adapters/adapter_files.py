"""The two files of a PEFT adapter's folder, read without trusting them.

The weights are read once into memory and everything, the digest included, comes from those bytes: a file that someone
is rewriting meanwhile can be refused, but neither mixed up nor (as a mapped file cut short would) kill the process.
Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_CONFIG_BYTES = 1 << 20
"""Hundreds of full module names in target_modules are some 50 KB."""

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's folder before any weight is read."""

    config: bytes
    weights: Path
    size: int  # bytes of the weights' file
    header: Mapping[str, TensorInfo]  # by tensor name; float32, float16 and bfloat16 only


def open_files(folder: Path) -> AdapterFiles:
    """Read the config and the header of the weights.

    Raises AdapterRefused: "missing_file", "too_large" (the config), "bad_file" (damaged, or of other dtypes).
    """
    if not folder.is_dir():
        raise AdapterRefused(
            "missing_file", f"no such folder; expected one that holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    config = _read_config(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise _no_weights(folder)
    return AdapterFiles(config, weights, weights.stat().st_size, _read_header(weights))


def read_tensors(files: AdapterFiles) -> tuple[dict[str, Tensor], str]:
    """All tensors by name, and the digest: sha256 over the config's bytes followed by the weights' bytes, in hex.

    The tensors are views of the bytes read: safetensors' own reader would copy them once more, and hold the GIL (the
    engine) meanwhile. Raises AdapterRefused("bad_file"), also when the file is not the one whose header was read.
    """
    changed = AdapterRefused("bad_file", f"{WEIGHTS_FILE} changed while it was read; load it again once it is complete")
    try:
        with files.weights.open("rb") as file:
            if os.fstat(file.fileno()).st_size != files.size:
                raise changed
            data = bytearray(files.size)
            if file.readinto(data) != files.size:
                raise changed
        tensors = _views(data, files.header)
    except OSError as error:
        raise _damaged(files.weights, error) from error
    if tensors is None:
        raise changed
    digest = hashlib.sha256(files.config)
    digest.update(data)
    return tensors, digest.hexdigest()


def _views(data: bytearray, header: Mapping[str, TensorInfo]) -> dict[str, Tensor] | None:
    """The tensors in the bytes of a safetensors file; None when its header does not say what `header` does."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        described = {name: info for name, info in json.loads(data[8:start]).items() if name != "__metadata__"}
        if {name: TensorInfo(_DTYPES[d["dtype"]], tuple(d["shape"])) for name, d in described.items()} != header:
            return None
        return {
            name: torch.frombuffer(
                data, dtype=info.dtype, count=math.prod(info.shape), offset=start + described[name]["data_offsets"][0]
            ).reshape(info.shape)
            for name, info in header.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError):  # frombuffer looks at the bounds
        return None


def _read_config(path: Path) -> bytes:
    if not path.is_file():
        raise AdapterRefused(
            "missing_file", f"there is no {CONFIG_FILE}; is this the folder PEFT's save_pretrained wrote?"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterRefused("bad_file", f"{CONFIG_FILE} cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterRefused("too_large", f"{CONFIG_FILE} has more than {MAX_CONFIG_BYTES} bytes")
    return data


def _no_weights(folder: Path) -> AdapterRefused:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = next((name for name in names if name.startswith("adapter_model") and name.endswith(_PICKLES)), None)
    if pickled is not None:
        return AdapterRefused(
            "missing_file",
            f"there is {pickled} but no {WEIGHTS_FILE}; pickles can run code and are never opened. Convert it where "
            'you trust it: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickled}', weights_only=True), '{WEIGHTS_FILE}')\"",
        )
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return AdapterRefused("missing_file", f"there is no {WEIGHTS_FILE}; the folder holds {found}")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    header = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                info = file.get_slice(name)
                dtype = info.get_dtype()
                if dtype not in _DTYPES:
                    raise AdapterRefused(
                        "bad_file", f"{WEIGHTS_FILE}: {name} is {dtype}; expected {', '.join(_DTYPES)}; convert it"
                    )
                header[name] = TensorInfo(_DTYPES[dtype], tuple(info.get_shape()))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error
    return header


def _damaged(path: Path, error: Exception) -> AdapterRefused:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return AdapterRefused("bad_file", f"{WEIGHTS_FILE} is a Git LFS pointer, not the weights; run git lfs pull")
    return AdapterRefused(
        "bad_file", f"{WEIGHTS_FILE} is damaged or cut short: {' '.join(str(error).split())}; copy or save it again"
    )
