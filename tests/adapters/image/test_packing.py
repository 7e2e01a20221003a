"""Conversions of what files hold to what images hold, against torch's, and strips against the slices they stand for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.adapters.image.packing import DTYPES, STRIP, OpenFile, pack

INT = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def strip(src: int, steps: tuple[int, int], shape: tuple[int, int], dst: tuple[int, int], **more: float) -> np.void:
    found = np.zeros(1, dtype=STRIP)[0]
    found["src"], (found["src_row"], found["src_col"]), (found["rows"], found["cols"]) = src, steps, shape
    found["dst"], found["dst_row"] = dst
    for name, value in more.items():
        found[name] = value
    return found


def convert(values: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """[n] of any dtype as [n] of `dtype`, by pack()."""
    image = torch.full((values.numel() * dtype.itemsize,), 0xAA, dtype=torch.uint8)
    row = strip(
        0,
        (0, 1),
        (1, values.numel()),
        (0, image.numel()),
        dtype=DTYPES.index(values.dtype),
        scale=scale or 1,
        scaled=scale is not None,
    )
    pack(np.array([row]), values.view(torch.uint8), image, dtype)
    return image.view(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    nan = expected.isnan()
    whole = INT[expected.dtype]
    return torch.equal(found.isnan(), nan) and torch.equal(found.view(whole)[~nan], expected.view(whole)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 2.0**-9, 3e4])
def test_every_value_of_16_bits(stored: torch.dtype, dtype: torch.dtype, scale: float | None) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(stored)
    expected = values.to(dtype) if scale is None else (values.float() * scale).to(dtype)
    assert same(convert(values, dtype, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_32_bits_where_rounding_decides(dtype: torch.dtype) -> None:
    """Every value of 16 bits, the ties between neighbours, a bit more, a bit less; and a million others."""
    sixteen = torch.arange(-(2**15), 2**15).to(torch.int16)
    exact = torch.cat((sixteen.view(torch.bfloat16).float(), sixteen.view(torch.float16).float())).view(torch.int32)
    edges = [exact, *(exact + half + bit for half in (1 << 15, 1 << 12) for bit in (-1, 0, 1))]
    random = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
    values = torch.cat([*edges, random.to(torch.int32)]).to(torch.int32).view(torch.float32)
    assert same(convert(values, dtype), values.to(dtype))


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    transposed=st.booleans(),
    offset=st.integers(0, 5),
    tail=st.integers(0, 70),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
)
def test_a_part_of_a_factor_however_it_lies(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    cut: tuple[float, float, float, float],
    transposed: bool,
    offset: int,
    tail: int,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> None:
    """From memory and from a file, at any address; the rest of its rows is zeroed and nothing else touched."""
    (first, last), (begin, end) = (
        sorted(round(share * size) for share in pair) for pair, size in zip((cut[:2], cut[2:]), shape, strict=True)
    )
    last, end = max(last, first + 1), max(end, begin + 1)
    first, begin = min(first, shape[0] - 1), min(begin, shape[1] - 1)
    last, end = min(last, shape[0]), min(end, shape[1])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(stored)
    lies = values.T.contiguous() if transposed else values
    steps = (1, shape[0]) if transposed else (shape[1], 1)
    raw = torch.cat((torch.zeros(offset, dtype=torch.uint8), lies.reshape(-1).view(torch.uint8)))
    rows, cols = last - first, end - begin
    width = cols * dtype.itemsize + tail
    record = strip(
        offset + (first * steps[0] + begin * steps[1]) * stored.itemsize,
        steps,
        (rows, cols),
        (3, width),
        dtype=DTYPES.index(stored),
        factor=1,
    )
    file = tmp_path_factory.getbasetemp() / "data"
    file.write_bytes(b"header" + raw.numpy().tobytes())
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for source in (raw, OpenFile(descriptor, len("header"))):
            image = torch.full((3 + rows * width + 5,), 0xAA, dtype=torch.uint8)
            peaks = np.zeros(3, dtype=np.int32)
            pack(np.array([record]), source, image, dtype, peaks)
            expected = values[first:last, begin:end].to(dtype)
            written = image[3:-5].view(rows, width)
            assert torch.equal(written[:, : width - tail], expected.contiguous().view(torch.uint8))
            assert not written[:, width - tail :].any()
            assert (image[:3] == 0xAA).all()
            assert (image[-5:] == 0xAA).all()
            assert peaks.tolist() == [0, int(expected.abs().contiguous().view(INT[dtype]).max()), 0]
    finally:
        os.close(descriptor)


def test_a_file_that_ends_early_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(100))
    records = np.array([strip(60, (0, 1), (1, 21), (0, 64), dtype=DTYPES.index(torch.bfloat16))])
    image = torch.zeros(64, dtype=torch.uint8)
    descriptor = os.open(tmp_path / "data", os.O_RDONLY)
    try:
        with pytest.raises(EOFError, match="ends before"):
            pack(records, OpenFile(descriptor, 0), image, torch.bfloat16)
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        pack(records, OpenFile(descriptor, 0), image, torch.bfloat16)
