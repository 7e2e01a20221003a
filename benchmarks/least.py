"""The most that a machine allows a server to answer: what README's served figures are set against.

A round of a load is one request of every stream. It takes at least the time of its prompts' arithmetic, and then that
of its decode steps, each reading all weights, each adapter worn and each row's keys and values once, or computing two
flops for each weight and row, whichever takes longer. HTTP, sampling and the client take none. The bandwidth and the
arithmetic are those of this machine, measured in the same run (kernels/machine.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.benchmarks.kernels.machine import Limits
from loraplex.benchmarks.paper import Base, Device, mixed_step


@dataclass(frozen=True)
class Load:
    """What is under way at a time."""

    streams: int
    adapters: int  # distinct ones; 0: the base
    elements: int  # of an adapter
    prompt: int  # tokens
    output: int  # tokens


def device(limits: Limits) -> Device:
    """This machine as one that a step can be worked out for."""
    return Device(f"{limits.threads} threads", limits.read, limits.bf16)


def least_seconds(base: Base, load: Load, on: Device) -> float:
    """Of one round."""
    first = mixed_step(base, load.streams, load.adapters, load.elements, load.prompt)
    # all tokens of a prompt go through the layers, and its last one through the head
    layers = 2 * (base.weights - base.vocab * base.shape.hidden) + (2 * load.elements if load.adapters else 0)
    prefill = first.flops + load.streams * (load.prompt - 1) * layers
    seconds = max(prefill / on.bf16, (first.weight_bytes + first.adapter_bytes) / on.read)
    # the prompt's last token gives the first one of the answer; the later ones see half of the answer on average
    steps, context = load.output - 1, load.prompt + load.output // 2
    return seconds + steps * mixed_step(base, load.streams, load.adapters, load.elements, context).least(on)


def most_tokens(base: Base, load: Load, on: Device) -> float:
    """Tokens of answers per second."""
    return load.streams * load.output / least_seconds(base, load, on)
