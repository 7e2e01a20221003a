"""rope_store_kv and attention over paged keys and values, against dense fp64 formulas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import AttentionMeta, AttentionParams, KVGroup, KVLayer, QKNorm, element_bytes
from tests.support.kv_pages import read_tokens, write_tokens
from tests.support.rounding import Exact, assert_near, exact, rounded

GROUP_LAYERS = 3
LAYER = 1  # of the group: its views start and end inside a page


def _params(
    heads: int, kv_heads: int, head_dim: int, window: int | None = None, softcap: float | None = None
) -> AttentionParams:
    return AttentionParams(heads, kv_heads, head_dim, head_dim**-0.5, window, softcap)


def _arena(backend: Backend, dtype: torch.dtype, params: AttentionParams, num_pages: int) -> tuple[Tensor, KVLayer]:
    """An arena of NaN (all bits set) and one layer's views into it; pages are longer than their keys and values."""
    plane = params.num_kv_heads * BLOCK_SIZE * params.head_dim
    page = GROUP_LAYERS * 2 * plane + 96
    arena = torch.full((num_pages, page * element_bytes(dtype)), 0xFF, dtype=torch.uint8, device=backend.device)
    elements = arena.view(-1).view(dtype)
    shape = (num_pages, params.num_kv_heads, BLOCK_SIZE, params.head_dim)
    stride = (page, BLOCK_SIZE * params.head_dim, params.head_dim, 1)
    k, v = (elements.as_strided(shape, stride, (2 * LAYER + i) * plane) for i in (0, 1))
    return arena, KVLayer(k, v, group=1)


@dataclass
class _Case:
    """Sequences (queries, kv_len) whose keys and values lie in shuffled pages, everything else being NaN."""

    layer: KVLayer
    meta: AttentionMeta
    q: Tensor  # [T, heads, D]
    k: list[Exact]  # per sequence [kv_heads, kv_len, D]
    v: list[Exact]


def _case(
    backend: Backend, dtype: torch.dtype, params: AttentionParams, lens: list[tuple[int, int]], seed: int = 0
) -> _Case:
    rng = np.random.default_rng(seed)
    blocks = [-(-kv_len // BLOCK_SIZE) for _, kv_len in lens]
    num_pages = sum(blocks) + 5
    _, layer = _arena(backend, dtype, params, num_pages)
    free = rng.permutation(num_pages).tolist()
    table = np.full((len(lens), max(blocks) + 2), -1, dtype=np.int32)
    keys, values = [], []
    for i, (n, kv_len) in enumerate(lens):
        k, v = (
            torch.from_numpy(rng.standard_normal((params.num_kv_heads, kv_len, params.head_dim))).to(dtype)
            for _ in range(2)
        )
        keys.append(exact(k))
        values.append(exact(v))
        visible = 0 if params.window is None else max(0, kv_len - n - params.window + 1)
        for block in range(visible // BLOCK_SIZE, blocks[i]):  # blocks past the window have been freed
            page = table[i, block] = free.pop()
            start, stop = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, kv_len)
            start = max(start, visible)  # nor may a stale key beside the window be mixed in
            slots = torch.arange(start, stop, device=backend.device) % BLOCK_SIZE
            pages = torch.full_like(slots, page)
            write_tokens(backend, layer, pages, slots, k[:, start:stop].swapaxes(0, 1), v[:, start:stop].swapaxes(0, 1))
    bounds = [0, *np.cumsum([n for n, _ in lens]).tolist()]
    q = torch.from_numpy(rng.standard_normal((bounds[-1], params.num_heads, params.head_dim)))
    nobody = torch.zeros(0, dtype=torch.int64, device=backend.device)
    other = KVGroup(torch.full_like(torch.from_numpy(table), 10**6).to(backend.device), nobody)
    meta = AttentionMeta(
        query_ptr=torch.tensor(bounds, dtype=torch.int32, device=backend.device),
        kv_lens=torch.tensor([kv_len for _, kv_len in lens], dtype=torch.int32, device=backend.device),
        query_bounds=tuple(bounds),
        kv_lens_host=tuple(kv_len for _, kv_len in lens),
        is_decode=tuple(n == 1 for n, _ in lens),
        groups=(other, KVGroup(torch.from_numpy(table).to(backend.device), nobody)),
    )
    return _Case(layer, meta, q.to(backend.device, dtype), keys, values)


def _expected(case: _Case, params: AttentionParams) -> tuple[Exact, Exact]:
    """The formula, one query and one head at a time: outputs and the size of what was averaged, [T, heads * D]."""
    q = exact(case.q)
    out, terms = np.empty_like(q), np.empty_like(q)
    for i, kv_len in enumerate(case.meta.kv_lens_host):
        start, stop = case.meta.query_bounds[i : i + 2]
        for token in range(start, stop):
            position = kv_len - (stop - token)
            oldest = 0 if params.window is None else max(0, position - params.window + 1)
            for head in range(params.num_heads):
                kv_head = head // (params.num_heads // params.num_kv_heads)
                k = case.k[i][kv_head, oldest : position + 1]
                v = case.v[i][kv_head, oldest : position + 1]
                scores = params.scale * (k @ q[token, head])
                if params.softcap is not None:
                    scores = params.softcap * np.tanh(scores / params.softcap)
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out[token, head] = p @ v
                terms[token, head] = p @ np.abs(v)
    return out.reshape(len(q), -1), terms.reshape(len(q), -1)


def _check(backend: Backend, dtype: torch.dtype, params: AttentionParams, lens: list[tuple[int, int]]) -> None:
    case = _case(backend, dtype, params, lens)
    out = backend.attention(case.q, case.layer, case.meta, params)
    assert out.shape == (case.meta.query_bounds[-1], params.num_heads * params.head_dim)
    assert out.dtype == dtype
    expected, terms = _expected(case, params)
    assert_near(out, expected, terms=4 * terms)


MIXED = [(1, 1), (1, 16), (1, 17), (1, 100), (5, 5), (16, 40), (33, 33), (2, 70)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (9, 3), (4, 1), (7, 1), (14, 2)])
def test_query_heads_share_kv_heads(backend: Backend, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    _check(backend, dtype, _params(heads, kv_heads, 64), MIXED)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_dims(backend: Backend, dtype: torch.dtype, head_dim: int) -> None:
    _check(backend, dtype, _params(4, 2, head_dim), MIXED)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 64])
def test_a_window_hides_and_never_reads_what_is_before(backend: Backend, dtype: torch.dtype, window: int) -> None:
    _check(backend, dtype, _params(4, 2, 64, window=window), MIXED)


@pytest.mark.parametrize("window", [None, 20])
def test_softcap(backend: Backend, dtype: torch.dtype, window: int | None) -> None:
    _check(backend, dtype, _params(4, 2, 64, window=window, softcap=1.5), MIXED)


@pytest.mark.parametrize("window", [None, 40])
def test_a_long_prefill_chunk_is_attended_in_blocks(backend: Backend, window: int | None) -> None:
    _check(backend, torch.float32, _params(3, 1, 64, window=window), [(300, 310), (1, 65), (129, 129)])


LONG = [(1, 512), (1, 513), (1, 1100), (3, 1026)]
"""Around the ranges of 512 keys that the CPU's threads share."""


@pytest.mark.parametrize("window", [None, 600])
def test_long_sequences(backend: Backend, dtype: torch.dtype, window: int | None) -> None:
    for lens in ([LONG[2]], LONG[:2], LONG):
        _check(backend, dtype, _params(6, 2, 64, window=window), lens)


def test_a_row_does_not_depend_on_its_neighbours(backend: Backend, dtype: torch.dtype) -> None:
    params = _params(4, 2, 64)
    case = _case(backend, dtype, params, MIXED)
    out = backend.attention(case.q, case.layer, case.meta, params)
    for i, kv_len in enumerate(case.meta.kv_lens_host):
        start, stop = case.meta.query_bounds[i : i + 2]
        table = case.meta.groups[1].block_table[i : i + 1]
        alone = AttentionMeta(
            query_ptr=torch.tensor([0, stop - start], dtype=torch.int32, device=backend.device),
            kv_lens=case.meta.kv_lens[i : i + 1],
            query_bounds=(0, stop - start),
            kv_lens_host=(kv_len,),
            is_decode=case.meta.is_decode[i : i + 1],
            groups=(case.meta.groups[0], KVGroup(table, case.meta.groups[1].store_index)),
        )
        assert torch.equal(backend.attention(case.q[start:stop], case.layer, alone, params), out[start:stop])


def test_a_sequence_without_queries_is_passed_over(backend: Backend) -> None:
    _check(backend, torch.float32, _params(2, 1, 64), [(3, 3), (0, 20), (1, 18)])


def _rotated(x: Exact, cos: Exact, sin: Exact) -> Exact:
    """The formula element by element: pair (j, j + d/2) turns by its angle."""
    half = cos.shape[-1] // 2
    y = x.copy()
    for j in range(half):
        y[..., j] = x[..., j] * cos[:, None, j] - x[..., j + half] * sin[:, None, j]
        y[..., j + half] = x[..., j + half] * cos[:, None, j + half] + x[..., j] * sin[:, None, j + half]
    return y


def _normed(x: Exact, weight: Tensor | None, offset: float, dtype: torch.dtype) -> Exact:
    if weight is None:
        return x
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    return rounded(exact(weight) * rounded(y, dtype) if offset == 0.0 else y * (1.0 + exact(weight)), dtype)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (96, 96), (128, 96), (256, 64)])
@pytest.mark.parametrize("qk_norm", [None, 0.0, 1.0])
def test_rope_store_kv(
    backend: Backend, dtype: torch.dtype, head_dim: int, rotary_dim: int, qk_norm: float | None
) -> None:
    params = _params(6, 2, head_dim)
    arena, layer = _arena(backend, dtype, params, num_pages=9)
    generator = torch.Generator().manual_seed(0)
    tokens = 11
    qkv = torch.randn(tokens, 10 * head_dim, generator=generator).to(backend.device, dtype)
    angles = torch.rand(tokens, rotary_dim, generator=generator) * 6.28
    cos, sin = angles.cos().to(backend.device), angles.sin().to(backend.device)
    q_norm, k_norm = (
        None if qk_norm is None else torch.randn(head_dim, generator=generator).to(backend.device, dtype)
        for _ in range(2)
    )
    store_index = torch.randperm(9 * BLOCK_SIZE, generator=generator)[:tokens].to(backend.device)
    kept = qkv.clone()
    norm = None if q_norm is None or k_norm is None else QKNorm(q_norm, k_norm, 1e-6, qk_norm or 0.0)
    q = backend.rope_store_kv(qkv, cos, sin, layer, store_index, params, norm)

    page, offset = store_index // BLOCK_SIZE, store_index % BLOCK_SIZE
    keys, values = read_tokens(backend, layer, page, offset)
    heads = exact(kept).reshape(tokens, 10, head_dim)
    assert q.shape == (tokens, 6, head_dim)
    for found, x, weight in ((q, heads[:, :6], q_norm), (keys, heads[:, 6:8], k_norm)):
        x = _normed(x, weight, qk_norm or 0.0, dtype)
        terms = np.abs(x)
        terms[..., :rotary_dim] += np.roll(terms[..., :rotary_dim], rotary_dim // 2, -1)
        # A norm that is rounded the other way moves both elements of a pair.
        wobble = 0.0 if qk_norm is None else terms
        assert_near(found, _rotated(x, exact(cos), exact(sin)), terms, wobble)
    assert np.array_equal(exact(values), heads[:, 8:])

    nan = torch.full_like(keys, torch.nan)
    write_tokens(backend, layer, page, offset, nan, nan)  # now all is NaN again: nothing else was written
    assert bool(arena.view(-1).view(dtype).isnan().all())


def test_what_is_stored_is_what_is_attended(backend: Backend) -> None:
    """Store a sequence token by token, as decoding does, and attend to it: the dense formula's result."""
    params = _params(2, 1, 64)
    _, layer = _arena(backend, torch.float32, params, num_pages=6)
    pages = [4, 0, 3]
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(40, 4 * 64, generator=generator).to(backend.device)
    cos, sin = torch.ones(1, 64, device=backend.device), torch.zeros(1, 64, device=backend.device)
    out = []
    for t in range(40):
        index = torch.tensor([pages[t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE], device=backend.device)
        q = backend.rope_store_kv(qkv[t : t + 1], cos, sin, layer, index, params, None)
        blocks = torch.tensor([pages[: t // BLOCK_SIZE + 1] + [-1] * (2 - t // BLOCK_SIZE)], dtype=torch.int32)
        group = KVGroup(blocks.to(backend.device), index)
        ptr = torch.tensor([0, 1], dtype=torch.int32, device=backend.device)
        lens = torch.tensor([t + 1], dtype=torch.int32, device=backend.device)
        out.append(
            backend.attention(q, layer, AttentionMeta(ptr, lens, (0, 1), (t + 1,), (True,), (group, group)), params)
        )
    x = exact(qkv).reshape(40, 4, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x[:, heads].swapaxes(0, 1).copy()) for heads in ([0, 1], [2, 2], [3, 3])), is_causal=True
    )
    assert_near(torch.cat(out), dense.transpose(0, 1).reshape(40, 128).numpy(), terms=4.0)
