"""What a decode step costs on a GPU that is not here, on paper: bytes and flops, and the least time for them.

A step of so many rows, each with an adapter of its own, reads every weight once, every adapter once, and each row's
keys and values; it computes two flops for each weight and row. The bytes of the adapter kernels were counted in
Triton's interpreter: a launch asks for 1.00 to 1.06 times the distinct bytes it touches (1.19 for the expand of
down_proj; see aot_report), so these are what the kernels ask for within a few per cent. Nothing here has been timed on
a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraplex.benchmarks.kernels.gpu_work import LLAMA3, SMOLLM2, Shape
from loraplex.benchmarks.replica import ReplicaSpec, StepTimes
from loraplex.benchmarks.steps import Calibration

CONTEXT = 390
"""Tokens of a decoding row for `replica`, mean: a prompt and half an answer of the lengths that are simulated."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
ELEMENT = 2  # bytes of bf16


@dataclass(frozen=True)
class Device:
    """Per second, as its maker states them."""

    name: str
    read: float  # bytes
    bf16: float  # flops, dense


H100 = Device("H100 SXM", 3.35e12, 989e12)


@dataclass(frozen=True)
class Base:
    """A model whose layers are all of one shape."""

    shape: Shape
    layers: int
    vocab: int

    @property
    def weights(self) -> int:
        """Elements that a step multiplies with: the layers and the head; of the embedding it reads a row a token."""
        per_layer = sum(n_in * sum(outs) for n_in, outs in self.shape.sites().values())
        return self.layers * per_layer + self.vocab * self.shape.hidden

    def adapter(self, rank: int) -> int:
        """Elements of an adapter on all seven linears."""
        per_layer = sum(rank * (n_in + out) for n_in, outs in self.shape.sites().values() for out in outs)
        return self.layers * per_layer

    def kv(self, context: int) -> int:
        """Elements of a row's keys and values."""
        return self.layers * 2 * context * self.shape.kv_heads * self.shape.head_dim


LLAMA_8B = Base(LLAMA3, 32, 128256)
SMOLLM2_135M = Base(SMOLLM2, 30, 49152)


@dataclass(frozen=True)
class Step:
    """One decode step; bytes and flops."""

    rows: int
    weight_bytes: int
    adapter_bytes: int
    kv_bytes: int
    flops: int

    @property
    def nbytes(self) -> int:
        return self.weight_bytes + self.adapter_bytes + self.kv_bytes

    def least(self, device: Device) -> float:
        """Seconds, moving and computing at once."""
        return max(self.nbytes / device.read, self.flops / device.bf16)

    def adapters_cost(self, device: Device) -> float:
        """Share that the adapters add to the base's step, both at their least."""
        share = self.adapter_bytes / (self.weight_bytes + self.kv_bytes)
        return share if self.nbytes / device.read >= self.flops / device.bf16 else 0.0


def step(base: Base, rows: int, rank: int = 16, context: int = 1024) -> Step:
    """Of `rows` rows with `context` tokens each and as many adapters."""
    return mixed_step(base, rows, rows, base.adapter(rank), context)


def mixed_step(base: Base, rows: int, adapters: int, elements: int, context: int) -> Step:
    """Of `rows` rows with `context` tokens each, which wear `adapters` distinct adapters of so many `elements`."""
    attention = 4 * base.layers * context * base.shape.heads * base.shape.head_dim
    worn = 2 * elements if adapters else 0
    return Step(
        rows=rows,
        weight_bytes=ELEMENT * base.weights,
        adapter_bytes=ELEMENT * adapters * elements,
        kv_bytes=ELEMENT * rows * base.kv(context),
        flops=rows * (2 * base.weights + worn + attention),
    )


def replica(base: Base = LLAMA_8B, device: Device = H100, rank: int = 16) -> Calibration:
    """A server whose steps take their least: what the cluster simulator makes of a GPU that nobody has measured.

    90 % of 80 GB hold the weights, 256 adapters and, in the rest, keys and values; adapters come over PCIe at 25 GB/s.
    """
    slots, adapter, memory = 256, ELEMENT * base.adapter(rank), 0.9 * 80e9
    kv = ELEMENT * base.kv(1)
    steps = StepTimes(
        fixed=ELEMENT * base.weights / device.read,
        per_row=CONTEXT * kv / device.read,
        per_adapter=adapter / device.read,
        per_prefill_token=2 * (base.weights + base.adapter(rank)) / device.bf16,
    )
    embedding = ELEMENT * base.vocab * base.shape.hidden
    spec = ReplicaSpec(
        steps=steps,
        rows=128,
        slots=slots,
        kv_tokens=int((memory - ELEMENT * base.weights - embedding - slots * adapter) / kv),
        load_seconds=adapter / 25e9,
        prefill_budget=2048,
    )
    return Calibration(spec, adapter, 0.0, f"{base.shape.name} on {device.name}, at its least on paper")


def table(base: Base = LLAMA_8B, device: Device = H100, rank: int = 16, context: int = 1024) -> list[str]:
    """A Markdown table, a row a number of adapters."""
    found = [step(base, rows, rank, context) for rows in ROWS]
    heads = (
        "rows = adapters",
        "weights",
        "adapters",
        "keys, values",
        "GFLOP",
        "least step",
        "tokens/s, most",
        "adapters add",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + " ---: |" * len(heads)]
    for each in found:
        cells: Sequence[str] = (
            f"{each.rows}",
            *(f"{part / 1e9:.2f} GB" for part in (each.weight_bytes, each.adapter_bytes, each.kv_bytes)),
            f"{each.flops / 1e9:,.0f}",
            f"{each.least(device) * 1e3:.2f} ms",
            f"{each.rows / each.least(device):,.0f}",
            f"{each.adapters_cost(device):.1%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines
