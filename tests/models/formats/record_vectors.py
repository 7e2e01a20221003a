"""Record what AutoGPTQ and AutoAWQ pack and compute, for test_gptq.py: neither installs beside a current torch.

    pip download --no-deps --only-binary :all: auto-gptq==0.7.1 autoawq==0.2.7.post3
    unzip '*.whl' -d FOLDER
    python -m tests.models.formats.record_vectors FOLDER

Of each wheel one file is run, on the CPU. Weights are 32 x 64; scales are fp16, and the libraries are given them in
fp32, so that what they compute is fp32 too.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VECTORS = Path(__file__).parent / "vectors" / "gptq_awq.safetensors"
OUT, COLUMNS = 32, 64

GPTQ: dict[str, tuple[int, int, bool, bool]] = {  # bits, group_size, symmetric, ordered by importance
    "gptq4": (4, 32, False, False),
    "gptq4 symmetric, ordered": (4, 16, True, True),
    "gptq4 ordered": (4, 16, False, True),
    "gptq4 by output": (4, -1, True, False),
    "gptq8": (8, 32, False, False),
    "gptq8 symmetric, ordered": (8, 32, True, True),
}
AWQ: dict[str, int] = {"awq": 32, "awq by output": -1}


def main(folder: Path) -> None:
    """Write VECTORS: for each case its tensors as they stand in a checkpoint, and `expected` [out, in] fp32."""
    generator = torch.Generator().manual_seed(20)
    found: dict[str, torch.Tensor] = {}
    qlinear = _file(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda.py")
    for name, (bits, group, symmetric, ordered) in GPTQ.items():
        found |= {f"{name}/{kind}": t for kind, t in _gptq(qlinear, bits, group, symmetric, ordered, generator).items()}
    packing = _file(folder / "awq/utils/packing_utils.py")
    for name, group in AWQ.items():
        found |= {f"{name}/{kind}": tensor for kind, tensor in _awq(packing, group, generator).items()}
    VECTORS.parent.mkdir(exist_ok=True)
    save_file(found, VECTORS)


def _drawn(bits: int, groups: int, symmetric: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw scales [out, groups], exact in fp16, and zeros [out, groups] from 1 up: AutoGPTQ cannot pack a zero of 0."""
    scale = (0.01 + torch.rand(OUT, groups, generator=generator) * 0.02).half().float()
    zeros = torch.randint(1, 1 << bits, (OUT, groups), generator=generator).float()
    return scale, torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros


def _gptq(
    qlinear: Any, bits: int, group: int, symmetric: bool, ordered: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    size = COLUMNS if group == -1 else group
    scale, zeros = _drawn(bits, COLUMNS // size, symmetric, generator)
    g_idx = (torch.arange(COLUMNS) // size).int()
    if ordered:
        g_idx = g_idx[torch.randperm(COLUMNS, generator=generator)]
    module = qlinear.QuantLinear(bits, group, COLUMNS, OUT, bias=False, weight_dtype=torch.float32)
    linear = torch.nn.Linear(COLUMNS, OUT, bias=False)
    codes = torch.randint(0, 1 << bits, (OUT, COLUMNS), generator=generator)
    linear.weight.data = (codes - zeros[:, g_idx.long()]) * scale[:, g_idx.long()]
    module.pack(linear, scale.clone(), zeros.clone(), g_idx)
    expected = module(torch.eye(COLUMNS)).T.contiguous()  # times the identity, so nothing is summed
    return {
        "qweight": module.qweight,
        "qzeros": module.qzeros,
        "scales": module.scales.half(),
        "g_idx": module.g_idx,
        "expected": expected.detach().clone(),
    }


def _awq(packing: Any, group: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = COLUMNS if group == -1 else group
    scale, _ = _drawn(4, COLUMNS // size, False, generator)
    words = torch.randint(-(1 << 31), 1 << 31, (COLUMNS, OUT // 8), generator=generator).int()
    zeros = torch.randint(-(1 << 31), 1 << 31, (COLUMNS // size, OUT // 8), generator=generator).int()
    scales = scale.T.contiguous()
    expected = packing.dequantize_gemm(words, zeros, scales, 4, size).T.contiguous()
    return {"qweight": words, "qzeros": zeros, "scales": scales.half(), "expected": expected}


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(Path(sys.argv[1]))
