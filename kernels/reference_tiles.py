"""Apply an adapter's tiles to a segment in plain PyTorch, for reference.py: what each kind of tile adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from loraplex.kernels.constants import ALIGN, BlockInput, Function, TileKind
from loraplex.kernels.records import element_bytes

FUNCTIONS: dict[Function, Callable[[Tensor], Tensor]] = {
    Function.IDENTITY: lambda u: u,
    Function.RELU: F.relu,
    Function.GELU: F.gelu,
    Function.GELU_TANH: lambda u: F.gelu(u, approximate="tanh"),
    Function.SILU: F.silu,
    Function.TANH: torch.tanh,
    Function.LEAKY_RELU: F.leaky_relu,
}


def add_tiles_(y: Tensor, sources: Sequence[Tensor], elements: Tensor, tiles: list[tuple[float, list[int]]]) -> None:
    """Apply the weighted tiles of x [n, in] to y [n, out]. `elements` is the arena in x's dtype, flat.

    sources: x, and at block sites x + residual and residual. Touches only the hull of the tiles' columns.
    """
    dtype = elements.dtype
    unit = ALIGN // element_bytes(dtype)
    lo = min(tile[3] for _, tile in tiles if tile[4])
    hi = max(tile[3] + tile[4] for _, tile in tiles)
    acc = torch.zeros(y.shape[0], hi - lo, dtype=torch.float32, device=y.device)
    u_of = (-1, 0)  # (a_off, n) of the u at hand: the pieces of a cut B share it
    u = acc
    floats = elements.view(torch.float32)
    activation: tuple[int, Tensor, int] | None = None  # of the next tile: source, c, function
    for w, (a_off, b_off, n, out_start, out_len, kind, in_start, in_len) in tiles:
        if kind == TileKind.ACTIVATION:
            activation, u_of = (n, floats[b_off * ALIGN // 4 + in_len :], in_start), (-1, 0)
            continue
        columns = acc[:, out_start - lo : out_start - lo + out_len]
        if kind == TileKind.SCALE:
            v = floats[b_off * ALIGN // 4 :][:out_len]
            columns.addcmul_(v - 1, y[:, out_start : out_start + out_len].float(), value=w)
            continue
        if kind == TileKind.BIAS:
            columns.add_(elements[b_off * unit :][:out_len], alpha=w)
            continue
        if u_of != (a_off, n):
            a = elements.as_strided((n, in_len), (in_len, 1), a_off * unit)
            source, c, function = activation or (BlockInput.BRANCH, None, Function.IDENTITY)
            s = sources[source][:, in_start : in_start + in_len]
            if c is None:
                u = F.linear(s, a).float()
            else:
                u = FUNCTIONS[Function(function)](F.linear(s.float(), a.float()) + c[:n]).to(dtype).float()
            u_of, activation = (a_off, n), None
        if kind == TileKind.DENSE:
            columns.add_(u, alpha=w)
        else:
            b = elements.as_strided((n, out_len), (out_len, 1), b_off * unit).float()
            columns.addmm_(u, b, alpha=w)
    columns = y[:, lo:hi]
    columns.copy_(acc.add_(columns))
