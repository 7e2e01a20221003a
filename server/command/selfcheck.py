"""`loraplex selfcheck`: what works on this machine's device, in a minute: ops, an answer end to end, a benchmark.

The ops are compared with the reference backend on the CPU, at the shapes of models people serve and adapters of ranks 1
to 256; an answer is that of a random model of two layers, made on the spot, with an adapter and without. On a GPU the
project's own kernel tests are run as well, where they and pytest are there: in a checkout.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from loraplex.benchmarks.kernels.gpu_work import (
    LLAMA3,
    SHAPES,
    SMOLLM2,
    Shape,
    fill_cache,
    make_work,
    run_adapters,
    run_all,
    run_attention,
    run_linears,
    run_sampling,
)
from loraplex.benchmarks.random_adapters import make_adapters
from loraplex.kernels.ops import Backend, BackendUnavailable
from loraplex.kernels.quantized import Activations
from loraplex.kernels.reference import ReferenceBackend
from loraplex.kernels.select import load_backend
from loraplex.server.command.build import build_engine
from loraplex.server.config_engine import Device, DType, EngineConfig
from loraplex.server.engine.request import GenerationRequest, SamplingParams
from loraplex.server.models.quantizing import SCHEMES

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of an op, relative to its largest output: what rounding and another order of sums may do."""

RANKS = (1, 7, 16, 33, 128, 256)

WEIGHT, ROWS = (320, 576), (1, 5, 70)
"""Of the check of quantised linears."""

KERNEL_TESTS = Path(__file__).resolve().parents[2] / "tests" / "kernels"
"""In a checkout; an installed package has no tests."""

TOKENS = 12
"""Of each answer of the end-to-end check."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str


def selfcheck(device: str) -> int:
    """Print the report. Exit code: 0 all passed, 1 something failed, 2 the device cannot be used at all."""
    try:
        ops = load_backend("auto", device)
    except BackendUnavailable as error:
        print(f"selfcheck: {error}", file=sys.stderr)
        return 2
    print(f"loraplex selfcheck: backend {ops.name} on {describe(ops.device)}, torch {torch.__version__}")
    checks = []
    for name, check in (*op_checks(ops), ("end to end", lambda: end_to_end(ops))):
        checks.append(_checked(name, check))
        print(_line(checks[-1]), flush=True)
    print("benchmark (median of 20, after warm-up)")
    with torch.inference_mode():
        for name, work in benchmarks(ops):
            print(f"  {name:56s} {1e6 * seconds(work, ops.device):10.1f} us", flush=True)
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


def describe(device: torch.device) -> str:
    """The device by name."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (capability {major}.{minor})"
    return f"{device} ({torch.get_num_threads()} threads)"


def op_checks(ops: Backend) -> list[tuple[str, Callable[[], str]]]:
    """One per model shape and dtype the backend computes in, one per dtype over ranks; on a GPU the kernel tests."""
    on_gpu = ops.device.type == "cuda"
    dtypes = [torch.float32, torch.bfloat16] + ([torch.float16] if on_gpu else [])
    # The largest shape only where there is something to run it on.
    shapes = [shape for shape in SHAPES if on_gpu or shape is not LLAMA3]
    checks: list[tuple[str, Callable[[], str]]] = []
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        checks += [(f"ops, {shape.name}, {name}", partial(compare_ops, ops, shape, dtype)) for shape in shapes]
        checks.append((f"adapters of ranks {RANKS[0]} to {RANKS[-1]}, {name}", partial(compare_ranks, ops, dtype)))
    checks.append(("quantised linears, bfloat16", partial(compare_quantised, ops)))
    if on_gpu and KERNEL_TESTS.is_dir() and find_spec("pytest") is not None:
        checks.append(("kernel tests", partial(kernel_tests, KERNEL_TESTS, f"{ops.name}-{ops.device.type}")))
    return checks


def compare_ops(ops: Backend, shape: Shape, dtype: torch.dtype) -> str:
    """Every op at a shape beside the reference on the CPU. Raises AssertionError with what is wrong."""
    return _compare(ops, dtype, partial(_every_op, shape, dtype))


def compare_ranks(ops: Backend, dtype: torch.dtype) -> str:
    """adapter_add_ for decode rows and prefill chunks. Raises AssertionError with what is wrong."""

    def run(backend: Backend) -> list[Tensor]:
        works = (make_work(backend, SMOLLM2, dtype, decode=3, prefill=(1, 17), rank=rank) for rank in RANKS)
        return [output for work in works for output in run_adapters(backend, work)]

    return _compare(ops, dtype, run)


def compare_quantised(ops: Backend) -> str:
    """Weights in every format of --quantize: products, and rows. Raises AssertionError with what is wrong."""

    def run(backend: Backend) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(*WEIGHT, generator=generator) * WEIGHT[1] ** -0.5
        x = torch.randn(max(ROWS), WEIGHT[1], generator=generator).to(backend.device, torch.bfloat16)
        ids = torch.arange(0, WEIGHT[0], 7, device=backend.device)
        outputs = []
        for scheme in SCHEMES.values():
            part = scheme.linears.quantize(weight).to(backend.device)
            for activations in Activations:
                packed = backend.pack_parts([part], torch.bfloat16, activations)
                outputs += [backend.linear(x[:rows], packed) for rows in ROWS]
            outputs.append(backend.embed(ids, packed, None))
        return outputs

    return _compare(ops, torch.bfloat16, run)


def _every_op(shape: Shape, dtype: torch.dtype, backend: Backend) -> list[Tensor]:
    work = make_work(backend, shape, dtype, decode=5, prefill=(1, 33), rank=24, kv=300)
    fill_cache(backend, work)
    return [*run_all(backend, work), *run_linears(backend, work), *run_sampling(backend, work)]


def _compare(ops: Backend, dtype: torch.dtype, run: Callable[[Backend], list[Tensor]]) -> str:
    with torch.inference_mode():
        found_all, expected_all = run(ops), run(ReferenceBackend(torch.device("cpu")))
    worst = 0.0
    for number, (found, expected) in enumerate(zip(found_all, expected_all, strict=True)):
        error = float((found.cpu().float() - expected.float()).abs().max() / expected.float().abs().max())
        if not error <= TOLERANCE[dtype]:  # NaN too
            allowed = f"{TOLERANCE[dtype]:.0e} allowed"
            raise AssertionError(f"output {number} is off by {error:.2e} of its largest value, {allowed}")
        worst = max(worst, error)
    return f"largest error {worst:.1e}"


def kernel_tests(folder: Path, chosen: str) -> str:
    """Run the tests in `folder` whose names contain `chosen`. Raises AssertionError with the end of what they say."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parents[1])
    last = result.stdout.strip().rpartition("\n")[2]
    if result.returncode:
        failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise AssertionError("; ".join([last, *failed[:5]]))
    return last


def end_to_end(ops: Backend) -> str:
    """Greedy answers of a small random model in fp32 on the device and on the CPU's reference ops: the same tokens."""
    with tempfile.TemporaryDirectory() as folder:
        base = _tiny_base(Path(folder) / "base")
        adapter = make_adapters(base, Path(folder), 1)[0]
        device = ops.device.type
        found = asyncio.run(_answers(base, adapter, EngineConfig(Device(device), DType.float32, memory=256 << 20)))
        plain = EngineConfig(Device.cpu, DType.float32, backend="reference", memory=256 << 20)
        expected = asyncio.run(_answers(base, adapter, plain))
    if found != expected:
        raise AssertionError(f"tokens {found}, expected {expected}")
    return f"{sum(map(len, found))} tokens of the base and of an adapter are the reference's"


def _tiny_base(path: Path) -> Path:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2))
    model.save_pretrained(path)
    return path


async def _answers(base: Path, adapter: Path, config: EngineConfig) -> list[list[int]]:
    """Of the base and of the adapter, to two prompts each, all at once."""
    parts = build_engine(config, base, "selfcheck")
    parts.engine.start()
    try:
        await parts.adapters.register("adapter", str(adapter))

        async def answer(name: str, prompt: tuple[int, ...]) -> list[int]:
            mix = ((parts.adapters.registry.lease(name), 1.0),) if name else ()
            params = SamplingParams(TOKENS, temperature=0.0)
            request = GenerationRequest(f"{name}{len(prompt)}", prompt, params, mix)
            return [event.token_id async for event in parts.engine.submit(request) if event.token_id is not None]

        prompts = (tuple(range(5, 30)), (7, 3, 9))
        return list(await asyncio.gather(*(answer(name, prompt) for name in ("", "adapter") for prompt in prompts)))
    finally:
        parts.engine.stop()
        parts.adapters.close()


def benchmarks(ops: Backend) -> list[tuple[str, Callable[[], object]]]:
    """One layer's adapters and attention, decode and prefill, in bf16."""
    runs: list[tuple[str, Callable[[], object]]] = []
    for shape in (SMOLLM2, LLAMA3) if ops.device.type == "cuda" else (SMOLLM2,):
        decode = make_work(ops, shape, torch.bfloat16, decode=32, prefill=(), kv=1000)
        prefill = make_work(ops, shape, torch.bfloat16, decode=0, prefill=(128, 128, 128, 128), kv=0)
        for name, work in (("32 decode rows, 32 adapters", decode), ("512 prefill tokens, 4 adapters", prefill)):
            runs.append((f"{shape.name}, {name}, 4 sites", partial(run_adapters, ops, work)))
            runs.append((f"{shape.name}, {name}, attention", partial(run_attention, ops, work)))
    return runs


def seconds(work: Callable[[], object], device: torch.device, times: int = 20) -> float:
    """Median wall time of `work`, the device's included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    taken = []
    for _ in range(times + 3):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return sorted(taken[3:])[times // 2]


def _checked(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except Exception as error:  # a report says what else works
        return Check(name, False, f"{type(error).__name__}: {error}")


def _line(check: Check) -> str:
    return f"  {'ok  ' if check.passed else 'FAIL'} {check.name:44s} {check.detail}"
