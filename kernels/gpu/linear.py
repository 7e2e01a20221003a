"""Base linears without a library: y = x W^T in tiles of fixed size, so that a row's sums never depend on other rows.

cuBLAS chooses kernel, tile and split of the sum by the number of rows; this kernel has one of each. It runs where batch
invariance is asked for alone: it knows nothing of the shape or the device, as a library does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraplex.kernels.gpu import tuning


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, in], weight [out, in] of the same dtype -> [T, out] in `dtype`, accumulated in fp32."""
    rows, n_in = x.shape
    n_out = weight.shape[0]
    y = torch.empty(rows, n_out, dtype=dtype, device=x.device)
    if y.numel():
        # Tiles of rows are neighbours in the grid: those of one tile of columns read its weights at about one time.
        _tile[(triton.cdiv(rows, tuning.LINEAR_ROWS), triton.cdiv(n_out, tuning.LINEAR_COLUMNS))](
            x,
            weight,
            y,
            rows,
            n_in,
            n_out,
            block_rows=tuning.LINEAR_ROWS,
            block=tuning.LINEAR_COLUMNS,
            depth=tuning.LINEAR_DEPTH,
            num_warps=tuning.LINEAR_WARPS,
        )
    return y


@triton.jit(do_not_specialize=["num_rows"])
def _tile(x, weight, y, num_rows, n_in, n_out, block_rows: tl.constexpr, block: tl.constexpr, depth: tl.constexpr):
    """Grid (tile of rows, tile of columns). Semantics: y = round(x @ W.T), summed in fp32 `depth` inputs at a time."""
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    of_rows = (rows < num_rows)[:, None]
    of_columns = columns < n_out
    x_rows = x + rows.to(tl.int64)[:, None] * n_in
    w_rows = weight + columns.to(tl.int64)[:, None] * n_in
    total = tl.zeros((block_rows, block), dtype=tl.float32)
    for start in range(0, n_in, depth):
        k = start + tl.arange(0, depth)
        inside = (k < n_in)[None, :]
        xs = tl.load(x_rows + k[None, :], mask=of_rows & inside, other=0.0)
        weights = tl.load(w_rows + k[None, :], mask=of_columns[:, None] & inside, other=0.0)
        total = tl.dot(xs, tl.trans(weights), total, input_precision="ieee")
    at = y + rows.to(tl.int64)[:, None] * n_out + columns[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=of_rows & of_columns[None, :])
