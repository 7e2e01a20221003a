"""Packing: what tiles promise the kernels, how many pages they take, and that they still are the adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraplex.adapters.image.tiles import (
    AdapterImage,
    BaseLayout,
    BiasDelta,
    DenseDelta,
    LowRank,
    OutputScale,
    Part,
    PartShape,
    most_tiles,
    plan_image,
    shape_of,
)
from loraplex.adapters.image.writing import pack, pack_each
from loraplex.kernels.constants import ALIGN, TILE_RANKS, TileKind
from loraplex.kernels.records import Projection, element_bytes
from loraplex.server.models.config import Site
from tests.support.refusals import refused

Parts = list[Part]


def _low_rank(layer: int, projection: Projection, rank: int, scaling: float = 2.0, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed * 1000 + layer)
    a = torch.randn(rank, projection.in_features, generator=generator)
    b = torch.randn(projection.out_features, rank, generator=generator)
    return LowRank(layer, projection, a, b, scaling)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _strip_bytes(parts: Parts, dtype: torch.dtype) -> int:
    """What the parts hold in `dtype`, each factor as one strip, its start padded."""
    item = element_bytes(dtype)
    total = 0
    for part in parts:
        rows, each = (part.a.shape[0], item) if isinstance(part, LowRank) else (1, item)
        if isinstance(part, OutputScale):
            each = 4
        total += _padded(part.projection.out_features * each * rows)
        if isinstance(part, LowRank):
            total += _padded(part.a.numel() * item)
    return total


def _folded(part: Part, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """A [r, in] and scaling * B transposed [r, out], or a single row [1, out]; as the device is to have them."""
    if isinstance(part, OutputScale):
        return None, part.values.unsqueeze(0)
    if isinstance(part, BiasDelta):
        return None, part.delta.to(dtype).unsqueeze(0)
    return part.a.to(dtype), (part.b.float() * part.scaling).T.to(dtype)


@dataclass
class _Tile:
    a: Tensor | None  # [n, in]; None: a bias or a scale
    b: Tensor  # [n, out_len]
    begin: int  # first column, within its projection
    end: int


def _read(image: AdapterImage, parts: Parts, layout: BaseLayout) -> list[list[_Tile]]:
    """Follow the tile table as a kernel would, checking what it promises; returns the tiles of each part."""

    def view(pos: int, rows: int, row: int, dtype: torch.dtype = layout.dtype) -> Tensor:
        elements, item = image.pages.view(-1).view(dtype), element_bytes(dtype)
        begin, end = pos * ALIGN, pos * ALIGN + rows * row * item  # positions count 64 bytes: aligned by nature
        assert begin // layout.page_bytes == (end - 1) // layout.page_bytes, "a tile crosses a page"
        assert end <= image.extent
        return elements[begin // item : end // item].view(rows, row)

    found: list[list[_Tile]] = [[] for _ in parts]
    table = image.tiles.tolist()
    assert [row[:2] for row in table] == sorted(row[:2] for row in table), "tiles are not sorted by (layer, site)"
    for layer, site, a_pos, b_pos, n, out_start, out_len, kind, *window in table:
        [i] = [
            i
            for i, part in enumerate(parts)
            if (part.layer, part.projection.site) == (layer, site)
            and part.projection.out_start <= out_start
            and out_start + out_len <= part.projection.out_start + part.projection.out_features
            and shape_of(part).kind == kind
            and (a_pos == -1 or window == [part.projection.in_start, part.projection.in_features])
        ]
        assert 1 <= n <= TILE_RANKS
        projection = parts[i].projection
        assert (a_pos == -1) == (kind != TileKind.LOW_RANK)
        a = None if a_pos == -1 else view(a_pos, n, projection.in_features)
        dtype = torch.float32 if kind == TileKind.SCALE else layout.dtype
        begin = out_start - projection.out_start
        found[i].append(_Tile(a, view(b_pos, n, out_len, dtype), begin, begin + out_len))
    return found


def _check(parts: Parts, layout: BaseLayout) -> AdapterImage:
    """Pack, follow the tiles, and put the factors together again: every element once, in order, bit for bit."""
    image = pack(parts, layout)
    _check_image(image, parts, layout)
    return image


def _check_image(image: AdapterImage, parts: Parts, layout: BaseLayout) -> None:
    """Follow the tiles, and put the factors together again."""
    assert (image.tiles.dtype, image.pages.dtype) == (torch.int32, torch.uint8)
    assert image.pages.shape == (-(-image.extent // layout.page_bytes), layout.page_bytes)
    for part, tiles in zip(parts, _read(image, parts, layout), strict=True):
        a, b = _folded(part, layout.dtype)
        rank, column, out = 0, 0, part.projection.out_features
        for tile in tiles:  # by rank, then by column
            n = len(tile.b)
            assert tile.begin == column
            assert torch.equal(tile.b, b[rank : rank + n, tile.begin : tile.end])
            assert (tile.a is None) == (a is None)
            if tile.a is not None and a is not None:
                assert torch.equal(tile.a, a[rank : rank + n])
            column = tile.end % out
            rank += n if tile.end == out else 0
        assert (rank, column) == (len(b), 0), "part of B is in no tile"


def _projections(draw: st.DrawFn, dtype: torch.dtype, ragged: bool) -> tuple[Projection, ...]:
    """A few projections; not ragged: rows are whole multiples of 64 bytes, as in every base in use."""
    unit = 1 if ragged else ALIGN // element_bytes(dtype)
    result = []
    for site in (Site.QKV, Site.O, Site.GATE_UP, Site.DOWN):
        n_in = draw(st.integers(1, 12)) * unit + draw(st.integers(0, 40)) * ragged
        start = 0
        for i in range(3 if site == Site.QKV else 1):
            n_out = draw(st.integers(1, 12)) * unit + draw(st.integers(0, 90)) * ragged
            result.append(Projection(f"{site.name.lower()}.{i}", site, n_in, start, n_out, False))
            start += n_out
    return tuple(result)


def _windows(projection: Projection) -> st.SearchStrategy[list[Projection]]:
    """The projection whole, or two windows that share its inputs."""
    wide = projection.in_features
    if wide < 2 * ALIGN:
        return st.just([projection])
    cut = ALIGN * (wide // ALIGN // 2)
    halves = [replace(projection, in_features=cut), replace(projection, in_start=cut, in_features=wide - cut)]
    return st.sampled_from([[projection], halves])


@st.composite
def _adapters(draw: st.DrawFn, ragged: bool) -> tuple[Parts, BaseLayout]:
    """Any targets, ranks, page size; in any order."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    item = element_bytes(dtype)
    projections = _projections(draw, dtype, ragged)
    layers = draw(st.integers(1, 4))
    parts: Parts = []
    for layer in range(layers):
        for projection in draw(st.lists(st.sampled_from(projections), unique=True)):
            for window in draw(_windows(projection)):
                parts.append(_low_rank(layer, window, draw(st.sampled_from([1, 2, 3, 8, 16, 17, 33])), seed=len(parts)))
            if draw(st.integers(0, 3)) == 0:
                parts.append(BiasDelta(layer, projection, torch.randn(projection.out_features)))
            if draw(st.integers(0, 3)) == 0:
                parts.append(OutputScale(layer, projection, torch.randn(projection.out_features)))
    # Long enough for the promise about pages: see the head of tiles.py.
    least = max(_padded(p.in_features * item) * (1 + p.in_features / p.out_features) for p in projections)
    page_bytes = _padded(int(least) + 1) + ALIGN * draw(st.integers(0, 300))
    return parts, BaseLayout("base", layers, projections, page_bytes, dtype)


@settings(max_examples=200)
@given(_adapters(ragged=False))
def test_an_adapter_takes_its_bytes_in_pages_and_at_most_one_more(case: tuple[Parts, BaseLayout]) -> None:
    parts, layout = case
    image = _check(parts, layout)
    nbytes = _strip_bytes(parts, layout.dtype)
    assert image.nbytes == nbytes  # cutting at page ends adds nothing
    assert len(image.pages) <= -(-nbytes // layout.page_bytes) + 1


@settings(max_examples=100)
@given(_adapters(ragged=True))
def test_ragged_rows_are_padded_and_otherwise_alike(case: tuple[Parts, BaseLayout]) -> None:
    parts, layout = case
    image = _check(parts, layout)
    assert len(image.pages) <= -(-image.nbytes // layout.page_bytes) + 1


@settings(max_examples=100)
@given(_adapters(ragged=False), st.integers(0, 3))
def test_the_smallest_pages_still_serve(case: tuple[Parts, BaseLayout], more: int) -> None:
    """One row of A per page, and rows of B longer than a page: more pages, and still the adapter."""
    parts, layout = case
    row = max(p.in_features for p in layout.projections) * element_bytes(layout.dtype)
    _check(parts, replace(layout, page_bytes=_padded(row) + more * ALIGN))


@settings(max_examples=200)
@given(_adapters(ragged=False) | _adapters(ragged=True), st.data(), st.booleans())
def test_fewer_parts_never_take_more_pages(case: tuple[Parts, BaseLayout], data: st.DataObject, smallest: bool) -> None:
    """What registration tells by the header alone is an upper bound."""
    parts, layout = case
    if smallest:
        row = max(_padded(p.in_features * element_bytes(layout.dtype)) for p in layout.projections)
        layout = replace(layout, page_bytes=row)
    shapes = [shape_of(part) for part in parts]
    left = [shape for shape in shapes if data.draw(st.booleans())]
    assert plan_image(left, layout).num_pages <= plan_image(shapes, layout).num_pages


_Q = Projection("self_attn.q_proj", Site.QKV, 576, 0, 576, False)
_K = Projection("self_attn.k_proj", Site.QKV, 576, 576, 192, False)
_V = Projection("self_attn.v_proj", Site.QKV, 576, 768, 192, False)
_O = Projection("self_attn.o_proj", Site.O, 576, 0, 576, False)
_GATE = Projection("mlp.gate_proj", Site.GATE_UP, 576, 0, 1536, False)
_UP = Projection("mlp.up_proj", Site.GATE_UP, 576, 1536, 1536, False)
_DOWN = Projection("mlp.down_proj", Site.DOWN, 1536, 0, 576, False)
_SMOLLM2 = BaseLayout("SmolLM2-135M", 30, (_Q, _K, _V, _O, _GATE, _UP, _DOWN), 368_640, torch.bfloat16)


@settings(max_examples=100)
@given(_adapters(ragged=False), st.data())
def test_parts_that_come_one_by_one_are_packed_where_all_of_them_would_be(
    case: tuple[Parts, BaseLayout], data: st.DataObject
) -> None:
    """Those that do not come have no tiles, and all others are as they are."""
    parts, layout = case
    whole, shapes = pack(parts, layout), [shape_of(part) for part in parts]
    some = data.draw(st.lists(st.sampled_from(parts), unique_by=id)) if parts else []
    image = pack_each(iter(some), shapes, layout)
    assert (image.pages.shape, image.nbytes, image.extent) == (whole.pages.shape, whole.nbytes, whole.extent)
    _check_image(image, some, layout)
    rows = {tuple(row) for row in whole.tiles.tolist()}
    assert {tuple(row) for row in image.tiles.tolist()} <= rows
    every = pack_each(iter(parts), shapes, layout)
    assert torch.equal(every.pages, whole.pages)
    assert torch.equal(every.tiles, whole.tiles)


def test_rank_one_on_one_projection_of_one_layer_takes_one_page() -> None:
    image = _check([_low_rank(7, _V, 1)], _SMOLLM2)
    assert image.pages.shape[0] == 1
    assert image.nbytes == image.extent == 576 * 2 + 192 * 2
    assert image.tiles.tolist() == [[7, Site.QKV, 0, 18, 1, 768, 192, TileKind.LOW_RANK, 0, 576]]


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_pages_and_tiles_of_an_adapter_on_every_linear(rank: int) -> None:
    parts: Parts = [_low_rank(layer, p, rank) for layer in range(30) for p in _SMOLLM2.projections]
    image = _check(parts, _SMOLLM2)
    nbytes = 30 * rank * 2 * sum(p.in_features + p.out_features for p in _SMOLLM2.projections)
    assert image.nbytes == nbytes
    assert image.pages.shape[0] == -(-nbytes // _SMOLLM2.page_bytes)  # not one more: no page has a hole
    assert image.extent == nbytes
    # Few and fat: 16 ranks each, but for what page ends cut (at most one cut in A, and a row of B into two pieces).
    whole = 210 * -(-rank // TILE_RANKS)
    assert whole <= image.tiles.shape[0] <= whole + 3 * image.pages.shape[0]


def test_order_of_parts_does_not_matter() -> None:
    parts: Parts = [_low_rank(layer, p, 3) for layer in range(4) for p in _SMOLLM2.projections]
    forward, backward = pack(parts, _SMOLLM2), pack(parts[::-1], _SMOLLM2)
    assert torch.equal(forward.tiles, backward.tiles)
    assert torch.equal(forward.pages, backward.pages)


def test_a_fused_projection_keeps_one_a() -> None:
    """Phi-3's qkv_proj: one A of rank 16, one B over q, k and v together; a single tile."""
    fused = Projection("self_attn.qkv_proj", Site.QKV, 576, 0, 960, False)
    image = _check([_low_rank(0, fused, 16)], replace(_SMOLLM2, projections=(fused,)))
    assert image.tiles[:, 2:].tolist() == [[0, 288, 16, 0, 960, TileKind.LOW_RANK, 0, 576]]


def test_a_vocabulary_long_b_is_cut_into_pieces_that_share_their_a() -> None:
    wide = Projection("wide", Site.GATE_UP, 576, 0, 49_152, False)
    layout = replace(_SMOLLM2, projections=(wide,), page_bytes=65_536)
    image = _check([_low_rank(0, wide, 2)], layout)
    assert image.pages.shape[0] == -(-image.nbytes // 65_536)
    assert len({row[2] for row in image.tiles.tolist()}) == 2 < image.tiles.shape[0]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scaling_is_folded_in_fp32_before_the_only_rounding(stored: torch.dtype) -> None:
    """1.5 * (1 + 2^-7 + 2^-8) rounded once differs from rounding B first."""
    value = 1 + 2.0**-7 + 2.0**-8
    a = torch.ones(1, 576, dtype=stored)
    b = torch.full((192, 1), value, dtype=stored)
    image = pack([LowRank(0, _K, a, b, 1.5)], _SMOLLM2)
    found = image.pages.view(-1).view(torch.bfloat16)[576:768]
    once = torch.tensor(float(b[0, 0]) * 1.5).to(torch.bfloat16)
    assert torch.equal(found, once.expand(192))
    if stored != torch.bfloat16:
        assert once != (torch.tensor(value).to(torch.bfloat16) * 1.5)


def test_b_may_be_a_transposed_view() -> None:
    """As fan_in_fan_out files and sliced fused weights come."""
    part = _low_rank(0, _K, 4)
    strided = LowRank(0, _K, part.a.T.contiguous().T, part.b.T.contiguous().T, part.scaling)
    assert torch.equal(pack([part], _SMOLLM2).pages, pack([strided], _SMOLLM2).pages)


def test_scales_are_kept_in_fp32_and_cut_at_page_ends() -> None:
    """Those of IA3: on k, v and up, in a page of a compute dtype of 16 bits."""
    values = {p: torch.linspace(0.5, 1.5, p.out_features) for p in (_K, _V, _UP)}
    layout = replace(_SMOLLM2, page_bytes=4096)
    image = _check([OutputScale(1, p, row) for p, row in values.items()], layout)
    assert image.nbytes == image.extent == 4 * (192 + 192 + 1536)
    assert image.tiles.tolist() == [
        [1, Site.QKV, -1, 0, 1, 576, 192, TileKind.SCALE, 0, 0],
        [1, Site.QKV, -1, 12, 1, 768, 192, TileKind.SCALE, 0, 0],
        [1, Site.GATE_UP, -1, 24, 1, 1536, 640, TileKind.SCALE, 0, 0],
        [1, Site.GATE_UP, -1, 64, 1, 2176, 896, TileKind.SCALE, 0, 0],
    ]
    with refused("not_finite", r"layer 0 self_attn.k_proj: scale has values .*float32"):
        pack([OutputScale(0, _K, torch.full((192,), torch.inf))], layout)


def test_nothing_to_pack_is_an_empty_image() -> None:
    image = pack([], _SMOLLM2)
    assert image.pages.shape == (0, 368_640)
    assert image.tiles.shape == (0, 10)
    assert image.nbytes == image.extent == 0


@pytest.mark.parametrize(("factor", "what"), [("a", "A"), ("b", "scaling")])
def test_values_that_overflow_the_compute_dtype_are_refused(factor: str, what: str) -> None:
    part = _low_rank(3, _O, 4)
    getattr(part, factor)[1, 2] = 60_000.0
    half = replace(_SMOLLM2, dtype=torch.float16)
    if factor == "a":
        pack([part], half)  # 60000 fits, doubled it would not
        part.a[1, 2] = 70_000.0
    with refused("not_finite", f"layer 3 self_attn.o_proj: {what}.*float16"):
        pack([part], half)
    pack([part], _SMOLLM2)  # bfloat16 holds it


def test_what_does_not_fit_is_named() -> None:
    good = _low_rank(0, _K, 4)
    with pytest.raises(ValueError, match=r"layer 31 .*layers 0 to 29"):
        pack([replace(good, layer=31)], _SMOLLM2)
    with pytest.raises(ValueError, match=r"A of shape \[4, 575\]; expected \[rank, 576\]"):
        pack([replace(good, a=good.a[:, 1:])], _SMOLLM2)
    with pytest.raises(ValueError, match=r"B of shape \[192, 3\]; expected \[192, 4\]"):
        pack([replace(good, b=good.b[:, 1:])], _SMOLLM2)
    with pytest.raises(ValueError, match=r"A of shape \[0, 576\]"):
        pack([replace(good, a=good.a[:0], b=good.b[:, :0])], _SMOLLM2)
    with pytest.raises(ValueError, match=r"bias of shape \[5\]; expected \[192\]"):
        pack([BiasDelta(0, _K, torch.zeros(5))], _SMOLLM2)
    with pytest.raises(ValueError, match=r"scale of shape \[5\]; expected \[192\]"):
        pack([OutputScale(0, _K, torch.zeros(5))], _SMOLLM2)
    with pytest.raises(ValueError, match=r"a row of A has 1152 bytes and a page 1088"):
        pack([good], replace(_SMOLLM2, page_bytes=1088))
    with pytest.raises(ValueError, match=r"page_bytes is 1000; expected a positive multiple of 64"):
        pack([good], replace(_SMOLLM2, page_bytes=1000))


_ANY = st.builds(
    Projection,
    st.just("p"),
    st.just(Site.QKV),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.just(0),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.just(False),
)


@settings(max_examples=200)
@given(st.integers(1, 3), st.lists(_ANY, min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 20), st.data())
def test_the_bound_on_tiles_holds_for_fewer_parts_too(
    layers: int, projections: list[Projection], rank: int, pages: int, data: st.DataObject
) -> None:
    least = max(4 * projection.in_features for projection in projections)
    page_bytes = -(-least // 64) * 64 + 64 * (pages - 1)
    layout = BaseLayout("b", layers, tuple(projections), page_bytes, torch.float32)
    places = [(layer, projection) for layer in range(layers) for projection in projections]
    shapes = [PartShape(*place, rank=data.draw(st.integers(1, rank))) for place in places]
    rows = data.draw(st.dictionaries(st.sampled_from(places), st.sampled_from((TileKind.BIAS, TileKind.SCALE))))
    shapes += [PartShape(*place, 1, kind) for place, kind in rows.items()]
    most = most_tiles(shapes, layout, plan_image(shapes, layout).num_pages)
    left = [shape for shape in shapes if data.draw(st.booleans())]
    assert len(plan_image(shapes, layout).tiles) <= most
    assert len(plan_image(left, layout).tiles) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out", "page"), [(64, 96, 4096), (64, 96, 960), (33, 50, 1024), (32, 16, 65536)])
def test_dense_changes_are_rows_of_a_alone(dtype: torch.dtype, width: int, out: int, page: int) -> None:
    """Every row once, a tile's columns those of its rows; beside a low rank, which fills what rows leave of a page."""
    projection = Projection("self_attn.k_proj", Site.QKV, width, 40, out, False)
    layout = BaseLayout("tiny", 2, (projection,), page // ALIGN * ALIGN, dtype)
    dense = DenseDelta(1, projection, torch.randn(out, width))
    image = pack([_low_rank(0, projection, 3), dense], layout)
    elements, item = image.pages.view(-1).view(dtype), element_bytes(dtype)
    found = torch.zeros(out, width, dtype=dtype)
    rows = [row for row in image.tiles.tolist() if row[7] == TileKind.DENSE]
    for layer, site, a_pos, b_pos, n, out_start, out_len, _, *window in rows:
        assert (layer, site, b_pos, window) == (1, Site.QKV, -1, [0, width])
        assert 1 <= n == out_len <= TILE_RANKS
        begin = a_pos * ALIGN
        assert begin // layout.page_bytes == (begin + n * width * item - 1) // layout.page_bytes
        assert begin + n * width * item <= image.extent
        found[out_start - 40 : out_start - 40 + n] = elements[begin // item :][: n * width].view(n, width)
    assert sum(row[4] for row in rows) == out
    assert torch.equal(found, dense.delta.to(dtype))
    shapes = [shape_of(part) for part in (_low_rank(0, projection, 3), dense)]
    assert len(image.tiles) <= most_tiles(shapes, layout, len(image.pages))
    lost = len(image.pages) * (width * item + ALIGN)  # a page's end holds no row
    assert image.extent <= _padded(width * item) * (out + 3) + _padded(out * item) * 3 + lost


def test_dense_changes_of_another_shape() -> None:
    projection = Projection("self_attn.k_proj", Site.QKV, 64, 0, 32, False)
    with pytest.raises(ValueError, match=r"expected \[32, 64\]"):
        pack([DenseDelta(0, projection, torch.ones(16, 64))], BaseLayout("tiny", 1, (projection,), 4096, torch.float32))
