"""Tokens of a layer's KV pages, wherever a backend puts their elements inside a page."""

from __future__ import annotations

from torch import Tensor

from loraplex.kernels.constants import BLOCK_SIZE
from loraplex.kernels.ops import Backend
from loraplex.kernels.records import KVLayer


def _places(backend: Backend, layer: KVLayer, pages: Tensor, slots: Tensor) -> list[tuple[Tensor, tuple[object, ...]]]:
    """Keys and values, each as a view and an index into the view that picks [N, kv_heads, ...] elements of N tokens.

    The CPU kernels keep a head's keys of a page as [head_dim / P][BLOCK_SIZE][P] and its values as
    [BLOCK_SIZE / P][head_dim][P], where P elements fill 32 bits; the others keep both as [BLOCK_SIZE][head_dim].
    """
    everywhere = slice(None)
    if backend.name != "cpu":
        return [(layer.k, (pages, everywhere, slots)), (layer.v, (pages, everywhere, slots))]
    count, heads, _, dim = layer.k.shape
    page, head = layer.k.stride()[:2]
    p = 4 // layer.k.element_size()
    keys = layer.k.as_strided((count, heads, BLOCK_SIZE, dim // p, p), (page, head, p, BLOCK_SIZE * p, 1))
    values = layer.v.as_strided((count, heads, BLOCK_SIZE // p, p, dim), (page, head, dim * p, 1, p))
    return [(keys, (pages, everywhere, slots)), (values, (pages, everywhere, slots // p, slots % p))]


def write_tokens(backend: Backend, layer: KVLayer, pages: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put keys and values [N, kv_heads, head_dim] of N tokens into `slots` of `pages`, [N] each."""
    for (view, index), tokens in zip(_places(backend, layer, pages, slots), (k, v), strict=True):
        view[index] = tokens.to(view).reshape(view[index].shape)


def read_tokens(backend: Backend, layer: KVLayer, pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values [N, kv_heads, head_dim] of the tokens in `slots` of `pages`, [N] each."""
    shape = (len(slots), layer.k.shape[1], layer.k.shape[3])
    k, v = (view[index].reshape(shape) for view, index in _places(backend, layer, pages, slots))
    return k, v
