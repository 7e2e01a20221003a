"""What is chosen about the engine when a server starts: where and in what it computes, memory, load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from typer import Option

from loraplex.server.options import check_least, memory_size, size


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """What to compute in. auto: the checkpoint's, but bfloat16 for float16 on the CPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    """How the base's linears are kept in memory. None: as its checkpoint has them, but the demo base in bfloat16."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    native = "native"  # as the checkpoint has them, the demo base too


class LinearInputs(StrEnum):
    """How exact the inputs of quantised linears are. None: what suits the format."""

    exact = "exact"
    a8 = "a8"


_MEMORY, _LOAD = "Memory", "Load"


@dataclass(frozen=True)
class EngineConfig:
    """Everything that is chosen about the engine; checked on construction (ValueError names the field)."""

    PANEL: ClassVar = "Engine"

    device: Annotated[Device, Option(metavar="auto|cpu|cuda", help="Where to run.")] = Device.auto
    dtype: Annotated[DType, Option(metavar="D", help="auto (the checkpoint's), float32, bfloat16 or float16.")] = (
        DType.auto
    )
    quantize: Annotated[
        Quantize | None,
        Option(
            metavar="int8|int4|nf4|native",
            show_default="as the base's files have them",
            help="Keep weights in fewer bits; native keeps the demo's GGUF as it is.",
        ),
    ] = None
    activations: Annotated[
        LinearInputs | None,
        Option(
            metavar="exact|a8",
            show_default="what suits the format",
            help="Inputs of quantised linears: as they are, or in 8 bits.",
        ),
    ] = None
    max_model_len: Annotated[  # None: less than the model's own where memory is short
        int | None,
        Option(metavar="N", min=2, show_default="the model's own", help="Context in tokens, prompt and answer."),
    ] = None
    batch_invariant: Annotated[
        bool, Option("--batch-invariant", help="An answer's bits never depend on what else is served. Slower.")
    ] = False
    backend: str = "auto"  # see load_backend
    memory: Annotated[  # an int: bytes; a float: a share
        float | None,
        Option(
            parser=memory_size,
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            show_default="what can be used, up to half of what is free",
            help="All that is taken, of the GPU where there is one: bytes (512M, 4G) or a share of what is free (50%).",
        ),
    ] = None
    host_store_bytes: Annotated[
        int | None,
        Option(
            "--host-memory",
            parser=size,
            metavar="SIZE",
            rich_help_panel=_MEMORY,
            show_default="2G beside a GPU; up to 256M of --memory on the CPU",
            help="For adapters that are read but not on the device.",
        ),
    ] = None
    num_slots: Annotated[
        int,
        Option("--max-loras", metavar="N", min=1, rich_help_panel=_MEMORY, help="Adapters on the device at once."),
    ] = 256
    max_num_seqs: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Sequences running at once.")
    ] = 32
    token_budget: Annotated[  # see policy/budget.py
        int | None,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            show_default="as many as take 100 ms",
            help="Tokens computed in one step.",
        ),
    ] = None
    decode_steps: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            help="Decode steps that may be one call of the kernels, on the CPU (up to 80 ms).",
        ),
    ] = 4
    max_waiting: Annotated[
        int,
        Option(
            metavar="N",
            min=1,
            rich_help_panel=_LOAD,
            help="Requests in the queue; further ones are answered with 429.",
        ),
    ] = 1024
    max_waiting_tokens: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Tokens of their prompts together.")
    ] = 1 << 19
    loader_threads: Annotated[
        int, Option(metavar="N", min=1, rich_help_panel=_LOAD, help="Threads that read adapters.")
    ] = 2

    def __post_init__(self) -> None:
        for name, known in (
            ("device", [*Device]),
            ("dtype", [*DType]),
            ("quantize", [None, *Quantize]),
            ("activations", [None, *LinearInputs]),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}")
        check_least(self)
        for name in ("memory", "host_store_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        if isinstance(self.memory, float) and self.memory > 1.0:
            raise ValueError(f"memory is {self.memory}; expected a share of at most 1.0, or whole bytes")
