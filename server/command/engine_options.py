"""The options of `loraplex serve` about the engine: what computes, in how much memory, and how much at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, ClassVar

from typer import Option

from loraplex.adapters.sources.downloads import DownloadConfig
from loraplex.server.command.option_groups import option_type
from loraplex.server.config import EngineConfig, parse_memory, parse_size

size, memory_size = option_type(parse_size), option_type(parse_memory)


class Device(StrEnum):
    """Where to run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    """What to compute in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class ComputeOptions:
    """What computes, and how."""

    PANEL: ClassVar = "Engine"

    device: Annotated[Device, Option(metavar="auto|cpu|cuda", help="Where to run.")] = Device.auto
    dtype: Annotated[DType, Option(metavar="D", help="auto (the checkpoint's), float32, bfloat16 or float16.")] = (
        DType.auto
    )
    max_model_len: Annotated[
        int | None,
        Option(metavar="N", min=2, show_default="the model's own", help="Context in tokens, prompt and answer."),
    ] = None
    batch_invariant: Annotated[
        bool, Option("--batch-invariant", help="An answer's bits never depend on what else is served. Slower.")
    ] = False


@dataclass(frozen=True)
class MemoryOptions:
    """What may be taken."""

    PANEL: ClassVar = "Memory"

    memory: Annotated[
        float | None,
        Option(
            parser=memory_size,
            metavar="SIZE",
            show_default="what can be used, up to half of what is free",
            help="All that is taken, of the GPU where there is one: bytes (512M, 4G) or a share of what is free (50%).",
        ),
    ] = None  # an int: bytes
    host_memory: Annotated[
        int | None,
        Option(
            parser=size,
            metavar="SIZE",
            show_default="2G beside a GPU; up to 256M of --memory on the CPU",
            help="For adapters that are read but not on the device.",
        ),
    ] = None
    max_loras: Annotated[int, Option(metavar="N", min=1, help="Adapters on the device at once.")] = 256


@dataclass(frozen=True)
class LoadOptions:
    """How much at once."""

    PANEL: ClassVar = "Load"

    max_num_seqs: Annotated[int, Option(metavar="N", min=1, help="Sequences running at once.")] = 32
    token_budget: Annotated[
        int | None,
        Option(metavar="N", min=1, show_default="as many as take 100 ms", help="Tokens computed in one step."),
    ] = None
    decode_steps: Annotated[
        int,
        Option(
            metavar="N", min=1, help="Tokens of each stream that may be delivered together, on the CPU (up to 80 ms)."
        ),
    ] = 4
    max_waiting: Annotated[
        int, Option(metavar="N", min=1, help="Requests in the queue; further ones are answered with 429.")
    ] = 1024
    max_waiting_tokens: Annotated[int, Option(metavar="N", min=1, help="Tokens of their prompts together.")] = 1 << 19
    loader_threads: Annotated[int, Option(metavar="N", min=1, help="Threads that read adapters.")] = 2


@dataclass(frozen=True)
class EngineOptions:
    """All of them."""

    compute: ComputeOptions
    memory: MemoryOptions
    load: LoadOptions

    def config(self, downloads: DownloadConfig) -> EngineConfig:
        total = self.memory.memory
        return EngineConfig(
            device=self.compute.device.value,
            dtype=self.compute.dtype.value,
            max_model_len=self.compute.max_model_len,
            memory_bytes=total if isinstance(total, int) else None,
            memory_fraction=total if isinstance(total, float) else None,
            count_process=True,
            max_num_seqs=self.load.max_num_seqs,
            token_budget=self.load.token_budget,
            decode_steps=self.load.decode_steps,
            num_slots=self.memory.max_loras,
            host_store_bytes=self.memory.host_memory,
            max_waiting=self.load.max_waiting,
            max_waiting_tokens=self.load.max_waiting_tokens,
            loader_threads=self.load.loader_threads,
            downloads=downloads,
            batch_invariant=self.compute.batch_invariant,
        )
