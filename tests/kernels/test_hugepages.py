"""What decode reads lies on huge pages: the weights and the arena, as the kernel itself counts them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraplex.kernels.cpu.backend import CpuBackend
from loraplex.kernels.cpu.weights import CpuLinear
from loraplex.kernels.hugepages import HUGE_PAGE, Region, huge_zeros

MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(autouse=True)
def _huge_pages() -> None:
    if not MODES.exists() or "[never]" in MODES.read_text():
        pytest.skip("this kernel gives no huge pages")


def mapping(tensor: Tensor) -> dict[str, int]:
    """The numbers, in KiB, that /proc/self/smaps has for the mapping that holds the tensor's first byte."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            inside = first <= tensor.data_ptr() < last
        elif inside and rest[-1:] == ["kB"]:
            found[name.rstrip(":")] = int(rest[0])
    return found


def assert_on_huge_pages(tensor: Tensor) -> None:
    found = mapping(tensor)
    assert found["Rss"] * 1024 >= tensor.numel() * tensor.element_size()
    # Nearly: a machine whose memory is in pieces may give a few small pages.
    assert found["AnonHugePages"] >= 0.9 * found["Rss"], found


def test_memory_costs_nothing_until_it_is_written() -> None:
    arena = huge_zeros(256 << 20)
    assert arena.data_ptr() % HUGE_PAGE == 0
    before = mapping(arena)["Rss"]
    arena[: 32 << 20] = 1
    written = mapping(arena)["Rss"] - before
    assert 32 << 10 <= written < 40 << 10
    assert_on_huge_pages(arena[: 32 << 20])
    assert int(arena[32 << 20 :: 4096].max()) == 0


@pytest.mark.parametrize("nbytes", [100_000, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 100_000])
def test_a_tensor_takes_its_bytes_and_no_more(nbytes: int) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    tensor = huge_zeros(nbytes)
    tensor[:] = 1
    assert nbytes <= resident() - before <= nbytes + 200_000
    del tensor
    assert resident() - before <= 200_000, "and gives them back"


@pytest.mark.parametrize("shape", [(3072, 576), (960, 576)])
def test_packed_weights(shape: tuple[int, int]) -> None:
    ops = CpuBackend()
    weights = [ops.pack_linear(torch.zeros(shape, dtype=torch.bfloat16)) for _ in range(4)]
    for weight in weights:
        assert isinstance(weight, CpuLinear)
        assert_on_huge_pages(weight.packed)


def test_a_region_comes_back_when_its_tensor_is_gone() -> None:
    """And only then: views, numpy arrays and records that hold them count."""
    back: list[Region] = []
    region = Region(3 * HUGE_PAGE + 5)
    tensor = region.tensor(HUGE_PAGE, back.append)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    view, array = tensor[100:].view(torch.uint8), tensor.numpy()
    tensor.fill_(7)
    del tensor
    gc.collect()
    assert not back
    del array
    assert int(view[0]) == 7
    assert not back
    del view
    assert back == [region]
    again = back.pop().tensor(3 * HUGE_PAGE + 5, back.append)
    assert int(again[HUGE_PAGE - 1]) == 7, "the same memory"
    assert int(again[-1]) == 0
    del again
    assert back == [region]
