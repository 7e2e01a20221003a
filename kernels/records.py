"""Records handed to the ops: plain, frozen, shapes beside the fields; constants.py has their numbers.

Memory layout (docs/architecture.md, "One arena"):

    arena      [num_pages, page_bytes] uint8, 64-byte aligned; a page belongs to no layer and no type
    KV page    [group_layers, 2, kv_heads, block_size, head_dim] in the KV dtype
    adapter    tiles packed end to end in pages, each tile start padded to 64 bytes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraplex.kernels.constants import OWN_INPUTS, OWN_NORMS, QUERY_NORM


@dataclass(frozen=True)
class Projection:
    """One linear of the checkpoint and where its output lies inside the fused output of its site.

    A site is a fused linear of a layer, where adapters act. The base's config numbers the sites of its layers from 0.
    """

    name: str  # path inside a layer: "self_attn.q_proj"; Phi-3: "self_attn.qkv_proj"
    site: int
    in_features: int
    out_start: int  # first column of its output within the site's output, elements
    out_features: int
    has_bias: bool  # of the base linear
    reads_hidden: bool = True  # its input is the hidden state
    gated_by: int | None = None  # its input is act(gate) * up, and gate and then up are the output of this site
    in_start: int = 0  # first input of a window of it: a part of an adapter may take in_features from there on


@dataclass(frozen=True)
class OwnPlaces:
    """Number what adapters may have of their own: each layer's norms, the last one, two tables, inputs of linears."""

    num_layers: int

    def norm(self, layer: int, index: int) -> int:
        """Return the place of the norm `index` of `layer`, below OWN_NORMS."""
        return layer * OWN_NORMS + index

    def of_heads(self, place: int) -> bool:
        """Tell whether the norm at `place` is of query or key heads."""
        return place < self.last_norm and place % OWN_NORMS >= QUERY_NORM

    @property
    def last_norm(self) -> int:
        return self.num_layers * OWN_NORMS

    @property
    def embed(self) -> int:
        return self.last_norm + 1

    @property
    def head(self) -> int:
        return self.last_norm + 2

    def input(self, layer: int, index: int) -> int:
        """Return the place of the input of the linear `index` of `layer`, below OWN_INPUTS."""
        return self.head + 1 + layer * OWN_INPUTS + index

    @property
    def count(self) -> int:
        return self.input(self.num_layers, 0)


@dataclass(frozen=True)
class OwnInput:
    """Outputs start to stop - 1 of a fused linear, whose input an adapter may turn."""

    place: int  # of OwnPlaces
    start: int
    stop: int


@dataclass(frozen=True)
class OwnTable:
    """Where resident adapters have rows of their own in place of the base's: a CSR over (slot, place) into the tiles.

    Their tiles have TileKind.OWN: rows out_start .. out_start + n - 1 are arena[a_off * 64 :] as [n, in_len], sorted by
    out_start. A norm is one row of fp32; rows of the embedding are in stream scale (Gemma's scale is in them), rows of
    the head as they are, both in the compute dtype. Whoever has such rows is worn alone, with weight 1. `wearers` knows
    those with low-rank changes of the tables too (TableSite), which mix as others do.

    At an input they have TileKind.TURN, and are worn in any mix: (a_off, -1, n, first, times, kind, 0, size) are rows
    of a matrix of blocks [size, size] along its diagonal, arena[a_off * 64 :] as [n, size] of the compute dtype. Row i
    is the matrix's row first + i and, where all inputs share a block, all rows behind it by less than `times` sizes.
    """

    ranges: Tensor  # [2 * num_slots, OwnPlaces.count, 2] int32: as TileTable.ranges, without second units
    ranges_host: Tensor
    wearers: Mapping[int, int]  # slot -> bits of Own; only slots that have any


@dataclass(frozen=True)
class TileTable:
    """Where the tiles of every resident adapter lie: a CSR over (slot, layer, site).

    Behind the base's layers one more stands for its tables, whose sites are TableSite's.

    A row of `tiles` is (a_off, b_off, n, out_start, out_len, kind, in_start, in_len), offsets in units of ALIGN bytes:
        LOW_RANK  A = arena[a_off * 64 :] as [n, in_len] of the compute dtype, row major, for x's columns [in_start,
                      in_start + in_len)
                  B = arena[b_off * 64 :] as [n, out_len]: row k is the output direction of rank k (PEFT's lora_B
                      transposed), alpha/r already folded in
        BIAS      B as above with n = 1, and no A: a_off is -1
        SCALE     v = arena[b_off * 64 :] as [out_len] of fp32, whatever the compute dtype; n = 1, a_off is -1
        DENSE     A as above with n = out_len, and no B: b_off is -1
        ACTIVATION  (-1, c_off, source, 0, 0, kind, function, first): the LOW_RANK tile of the next row is of a
                  bottleneck; c = arena[c_off * 64 :] as fp32 from element `first` on, one for each rank of that
    TileKind says what each adds. Several LOW_RANK tiles may share an A and so its window (a B cut into pieces), and an
    A may be followed by its B on another page.
    """

    ranges: Tensor  # [2 * num_slots, num_layers + 1, num_sites, 2] int32: first and past-the-last row of `tiles`
    # row num_slots + s: the second unit of the adapter in slot s, tiles that other tokens than its first's wear
    tiles: Tensor  # [capacity, TILE_COLUMNS] int32
    ranges_host: Tensor  # the same on the host (the same object on CPU)
    tiles_host: Tensor
    own: OwnTable | None = None  # None: no adapter has rows of its own

    @property
    def num_layers(self) -> int:
        """Of the base: the number, too, of the layer that stands for its tables."""
        return self.ranges_host.shape[1] - 1


@dataclass(frozen=True)
class AdapterSegments:
    """Token ranges of a step and the mix of adapters each wears.

    Segment s covers tokens [indptr[s], indptr[s + 1]) and adds sum over m in [mix_ptr[s], mix_ptr[s + 1]) of
    mix_weight[m] * (adapter in slot mix_slot[m]). Tokens from indptr[S] on are base-only and cost nothing; so are those
    of a segment between others whose mix is empty (what a sequence had before it called an adapter).
    The first `num_decode_segments` segments hold decode rows (bgmv), the others prefill chunks (sgmv): the choice
    is the token's own role and never depends on its neighbours, so neither does its result.
    """

    indptr: Tensor  # [S + 1] int32
    mix_ptr: Tensor  # [S + 1] int32
    mix_slot: Tensor  # [M] int32
    mix_weight: Tensor  # [M] float32
    bounds: tuple[int, ...]  # indptr on the host
    mixes: tuple[tuple[tuple[int, float], ...], ...]  # per segment: ((slot, weight), ...) on the host
    num_decode_segments: int


@dataclass(frozen=True)
class AdapterStep:
    """The adapters of one step: the memory their tiles lie in, where, and which tokens use which."""

    arena: Tensor  # [num_pages, page_bytes] uint8
    table: TileTable
    segments: AdapterSegments

    @cached_property
    def own(self) -> int:
        """Return what its tokens' adapters act on outside the layers' linears: bits of Own."""
        own = self.table.own
        if own is None or not own.wearers:
            return 0
        bits = 0
        for mix in self.segments.mixes:
            for slot, _ in mix:
                bits |= own.wearers.get(slot, 0)
        return bits


@dataclass(frozen=True)
class QKNorm:
    """An RMS norm over each query head and each key head, before they are rotated."""

    q: Tensor  # [head_dim]
    k: Tensor  # [head_dim]
    eps: float
    offset: float  # as of Backend.rms_norm
    place: int = -1  # of OwnPlaces, of q's norm; k's is the next. -1: adapters have none of their own


@dataclass(frozen=True)
class KVLayer:
    """One layer's keys and values: views into the arena, page by page (strided: a page holds its group's layers).

    Where a head's elements lie inside a page is the backend's own: as the shapes say on the reference and the GPU, in
    the order of the kernels' tiles on the CPU (kernels/cpu/attention.h). Everybody else moves whole pages.
    """

    k: Tensor  # [num_pages, kv_heads, block_size, head_dim]
    v: Tensor  # [num_pages, kv_heads, block_size, head_dim]
    group: int  # index into AttentionMeta.groups


@dataclass(frozen=True)
class KVGroup:
    """Page tables of one KV group for one step. Layers with the same window share a group (see kv_groups)."""

    block_table: Tensor  # [num_seqs, max_blocks] int32: page of each block of 16 tokens; -1: past the window or absent
    store_index: Tensor  # [num_tokens] int64: page * block_size + offset where this step's token is written


@dataclass(frozen=True)
class AttentionMeta:
    """The sequences of one step. Sequence i owns tokens [query_bounds[i], query_bounds[i + 1])."""

    query_ptr: Tensor  # [num_seqs + 1] int32
    kv_lens: Tensor  # [num_seqs] int32: tokens in the cache after this step's are stored
    query_bounds: tuple[int, ...]  # query_ptr on the host
    kv_lens_host: tuple[int, ...]
    is_decode: tuple[bool, ...]  # per sequence: a decode row (one token) or a prefill chunk (which may be one token)
    groups: tuple[KVGroup, ...]


@dataclass(frozen=True)
class AttentionParams:
    """What a layer's attention is, constant over the run."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # a query at position p sees keys p - window + 1 .. p; None: all of the past
    softcap: float | None  # scores = softcap * tanh(scores / softcap)


def element_bytes(dtype: torch.dtype) -> int:
    """Bytes of one element of `dtype`."""
    return torch.empty(0, dtype=dtype).element_size()
