"""Which backend runs here: the one module that knows devices by name."""

from __future__ import annotations

import os

import torch

from loraplex.kernels.ops import Backend, BackendUnavailable


def load_backend(name: str, device: str = "auto", batch_invariant: bool = False) -> Backend:
    """The backend called `name` on `device` ("auto" | "cpu" | "cuda"). Chosen once at start-up and injected.

    "auto" is the C++ kernels on the CPU and the Triton kernels on a GPU. batch_invariant: a token's results are the
    same bits whatever is computed beside it, however its prompt is cut into chunks, and whether it is computed as part
    of a prompt or as the next token of an answer. Slower: no library GEMM, and decode rows take the prefill kernels.

    Raises BackendUnavailable when it cannot run here, ValueError for a name nobody has.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("device 'cuda' was asked for but torch sees no GPU here; use --device cpu")
    if name == "auto":
        name = "cpu" if device == "cpu" else "triton"
    if name == "reference":
        from loraplex.kernels.reference import ReferenceBackend

        if batch_invariant:
            raise BackendUnavailable("the backend 'reference' is not batch-invariant: its products are a library's")
        return ReferenceBackend(torch.device(device))
    if name == "cpu":
        from loraplex.kernels.cpu.backend import CpuBackend

        if device != "cpu":
            raise BackendUnavailable(f"the backend 'cpu' was asked for on device {device!r}; it runs on cpu only")
        return CpuBackend(batch_invariant=batch_invariant)
    if name == "triton":
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailable(
                "the backend 'triton' was asked for on device 'cpu'; it needs a GPU (TRITON_INTERPRET=1 interprets its "
                "kernels on a CPU, for tests alone)"
            )
        try:
            from loraplex.kernels.gpu.backend import TritonBackend
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise BackendUnavailable(
                "the backend 'triton' was asked for but triton is not installed: pip install triton"
            ) from None
        return TritonBackend(torch.device(device), batch_invariant)
    raise ValueError(f"unknown backend {name!r}; there are: auto, cpu, reference, triton")
