"""What quantised weights and 8-bit inputs cost in accuracy: the divergence of next-token distributions on real text.

    python -m loraplex.benchmarks.kl            # the demo base
    python -m loraplex.benchmarks.kl native     # the demo base's own GGUF
    python -m loraplex.benchmarks.kl BASE       # any other; one that is quantised already is measured as it is

Each way of keeping the base is computed by the kernels of this machine, in bf16 as it is served, and set against two
others in fp32: the base as its files have it, and the way's own weights, dequantised. The first is what the way costs
in all, the second what its kernels and the rounding of inputs add.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, QuantizedWeight, dequantize
from loraplex.kernels.select import load_backend
from loraplex.server.config import DEMO
from loraplex.server.engine.policy.kv_groups import kv_groups
from loraplex.server.engine.step.arena import kv_layers
from loraplex.server.engine.step.memory import page_bytes
from loraplex.server.models.checkpoint import Checkpoint, StoredTensor
from loraplex.server.models.config import ModelConfig
from loraplex.server.models.decoder import Decoder
from loraplex.server.models.inputs import ForwardBatch, no_tiles
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import SCHEMES, QuantizingCheckpoint
from loraplex.server.models.weight_sizes import format_names, resident_bytes
from loraplex.server.models.weights import load_checkpoint
from loraplex.server.startup import find_base
from loraplex.server.text.tokenizer import Tokenizer

TOKENS, LENGTH = 1024, 256
"""Of the text, and of each sequence it is cut into."""


@dataclass(frozen=True)
class Way:
    """One way to keep a base."""

    name: str
    checkpoint: Checkpoint
    activations: Activations | None  # None: nothing is quantised


@dataclass(frozen=True)
class Divergence:
    """Of T next-token distributions from T others, in nats."""

    mean: float
    high: float  # the 99th percentile
    same: float  # share of tokens with the same likeliest next token

    @classmethod
    def of(cls, logits: Tensor, others: Tensor) -> Divergence:
        """Compare logits [T, vocab] with those they should be."""
        found, expected = logits.log_softmax(-1), others.log_softmax(-1)
        nats = (expected.exp() * (expected - found)).sum(-1)
        same = (logits.argmax(-1) == others.argmax(-1)).float().mean()
        return cls(float(nats.mean()), float(nats.quantile(0.99)), float(same))

    def __str__(self) -> str:
        return f"{self.mean:9.5f} {self.high:9.5f} {self.same:8.2%}"


class Held:
    """A checkpoint whose tensors were read once, and quantised once."""

    def __init__(self, source: Checkpoint) -> None:
        self.folder, self.tensors = source.folder, source.tensors
        self._read = {name: source.read(name) for name in source.tensors}

    def read(self, name: str) -> Tensor | QuantizedWeight:
        """Return the tensor `name`."""
        return self._read[name]


@dataclass(frozen=True)
class Dequantised:
    """The weights of a checkpoint as numbers in fp32."""

    quantised: Checkpoint

    @property
    def folder(self) -> Path:
        return self.quantised.folder

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        return {name: replace(stored, format=None) for name, stored in self.quantised.tensors.items()}

    def read(self, name: str) -> Tensor:
        """Read the tensor `name` in fp32."""
        tensor = self.quantised.read(name)
        return dequantize(tensor) if isinstance(tensor, QuantizedWeight) else tensor


def text() -> str:
    """Collect English prose that every Python has: the topics of its help."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def ways(base: Checkpoint) -> Iterator[Way]:
    """List the ways to keep `base`: with exact inputs, and with inputs in 8 bits."""
    if format_names(base):
        yield from (Way(f"{format_names(base)}, {each}", base, each) for each in Activations)
        return
    yield Way("dense", base, None)
    for kind in SCHEMES:
        quantised = Held(QuantizingCheckpoint(base, kind))
        yield from (Way(f"{format_names(quantised)}, {each}", quantised, each) for each in Activations)


def logits(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ops: Backend,
    dtype: torch.dtype,
    activations: Activations | None,
    ids: Tensor,
) -> Tensor:
    """Compute the logits [T, vocab] fp32 after each of T tokens, LENGTH at a time."""
    groups = kv_groups(config.windows)
    page = page_bytes(config, dtype, groups)
    arena = torch.zeros(len(groups) * -(-LENGTH // BLOCK_SIZE), page, dtype=torch.uint8)
    weights = load_checkpoint(checkpoint, config, ops, dtype, activations=activations)
    decoder = Decoder(config, weights, ops, kv_layers(arena, config, dtype, groups), arena)
    found = []
    with torch.inference_mode():
        for part in ids.split(LENGTH):
            blank = ForwardBatch.blank(no_tiles(config), decoder.num_kv_groups, tokens=len(part))
            batch = replace(blank, input_ids=part, logit_rows=torch.arange(len(part)))
            found.append(decoder.logits(decoder.forward(batch)))
    return torch.cat(found)


def main() -> None:
    """Measure the base that the command line names, and print a line for each way to keep it."""
    given = sys.argv[1] if len(sys.argv) > 1 else DEMO
    folder = find_base(DEMO, native=True) if given == "native" else find_base(given)
    config, ops = ModelConfig.from_hf(folder), load_backend("cpu", "cpu")
    ids = torch.tensor(Tokenizer.read(folder).encode(text()[: 16 * TOKENS])[:TOKENS])
    base = open_checkpoint(folder)
    exact = logits(Dequantised(base), config, ops, torch.float32, None, ids)
    print(f"{len(ids)} tokens of {folder.name}; nats: mean, 99th percentile; share with the same likeliest token")
    print(f"{'weights, inputs':28} {'MiB':>6}   {'to the base in fp32':28}   to its own weights in fp32", flush=True)
    own, of = exact, base
    for way in ways(base):
        if way.checkpoint is not of:
            own, of = logits(Dequantised(way.checkpoint), config, ops, torch.float32, None, ids), way.checkpoint
        found = logits(way.checkpoint, config, ops, torch.bfloat16, way.activations, ids)
        size = resident_bytes(way.checkpoint, config, torch.bfloat16, ops, not config.tie_word_embeddings) / 2**20
        told = "   ".join(str(Divergence.of(found, other)) for other in (exact, own))
        print(f"{way.name:28} {size:6.0f}   {told}", flush=True)


if __name__ == "__main__":
    main()
