"""What a server is once its base is loaded: what it was told, and what base and machine decided."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex.server.config import ServeConfig


@dataclass(frozen=True)
class BaseFormats:
    """What the base's weights are in memory."""

    dtype: str = "float32"  # what is computed in, and what dense weights are in
    weights: str = ""  # formats of quantised weights, as "Q4_1 + Q8_0"; "": there are none
    activations: str = ""  # of quantised linears: "exact" or "a8"

    def __str__(self) -> str:
        return f"{self.weights}, inputs {self.activations}, {self.dtype}" if self.weights else self.dtype


@dataclass(frozen=True)
class Facts:
    """One server's facts, which do not change while it runs."""

    config: ServeConfig
    vocab_size: int
    max_model_len: int  # tokens, prompt and answer
    num_pages: int  # of the arena
    page_bytes: int
    block_size: int  # tokens in a page of the KV cache
    created: int  # unix seconds
    formats: BaseFormats = BaseFormats()
    device: str = "cpu"
    memory: tuple[tuple[str, int, str], ...] = ()  # name, bytes and a remark of each part

    @property
    def dtype(self) -> str:
        """Return the dtype that is computed in."""
        return self.formats.dtype

    @property
    def names(self) -> tuple[str, ...]:
        """List what requests call the base; the first is the parent in adapter cards, and the metrics' model_name."""
        return self.config.base_names

    @property
    def max_requests(self) -> int:
        """Count the most requests, running and queued."""
        return self.config.engine.max_num_seqs + self.config.engine.max_waiting

    @property
    def cache_tokens(self) -> int:
        """Count the tokens that have room in the KV cache together."""
        return self.num_pages * self.block_size
