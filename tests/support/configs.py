"""Configs of models that need no checkpoint."""

from __future__ import annotations

from dataclasses import replace

from loraplex.benchmarks.kernels.model import SMOLLM2

TINY = replace(
    SMOLLM2, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=1, head_dim=16,
    windows=(8, None, 8), rope_of_layer=(0, 0, 0), vocab_size=320,
    ropes=(replace(SMOLLM2.ropes[0], rotary_dim=16),),
)  # fmt: skip
