"""The loops that limits are measured by: they stay in registers, and a library's large product does not outdo them.

The comparison with the library is the one test that times: what every share of a limit rests on is the limit, and a
wrong one (7 GFLOP/s where 200 were there) shows in nothing else.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loraplex.benchmarks import bench_limits
from loraplex.benchmarks.commands import MISUSED, app
from loraplex.benchmarks.kernels import machine, probes
from tests.support.inner_loops import STACK, inner_loops

X86, ARM = ("g++", "objdump"), ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump")
AVX512 = ("-mavx512f", "-mfma")

CASES = {  # compiler and flags; the instruction of fp32 and of bf16 and the register they are on; chains
    "sse2": (X86, (), "mulps", "mulps", "xmm", 10),
    "avx2": (X86, ("-mavx2", "-mfma"), "vfmadd", "vfmadd", "ymm", 10),
    "avx512": (X86, AVX512, "vfmadd", "vfmadd", "zmm", 20),
    "avx512bf16": (X86, (*AVX512, "-mavx512bf16"), "vfmadd", "vdpbf16ps", "zmm", 20),
    "amx": (X86, (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), "vfmadd", "vdpbf16ps", "zmm", 20),
    "neon": (ARM, (), "fmla", "fmla", r"v\d+\.4s", 20),
    "neonbf16": (ARM, ("-march=armv8.2-a+bf16",), "fmla", "bfdot", r"v\d+\.4s", 20),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[str]]]:
    """A name of CASES, and the innermost loop of each probe that it has."""
    (compiler, objdump), flags, *_ = CASES[request.param]
    if shutil.which(compiler) is None or shutil.which(objdump) is None:
        pytest.skip(f"{compiler} or {objdump} is missing")
    library = tmp_path_factory.mktemp("probes") / "probes.so"
    probes.build(library, flags, compiler)
    found = {}
    for function, loops in inner_loops(library, objdump).items():
        if name := re.fullmatch(r"(read_all|multiply_fp32|multiply_bf16|multiply_tiles)\._omp_fn\.0", function):
            found[name[1]] = max(loops, key=len)
    return request.param, found


def test_loops_stay_in_registers(case: tuple[str, dict[str, list[str]]]) -> None:
    name, loops = case
    *_, fp32, bf16, register, chains = CASES[name]
    if tiles := loops.pop("multiply_tiles", []):
        assert [each.split()[0] for each in tiles[:6]] == ["tdpbf16ps"] * 6
        assert len({each[-4:] for each in tiles[:6]}) == 6, "sums of their own"
        assert len(tiles) <= 10
    assert bool(tiles) == (name == "amx")
    assert loops.keys() == {"read_all", "multiply_fp32"} | ({"multiply_bf16"} if bf16 != fp32 else set())
    for probe, instruction in (("multiply_fp32", fp32), ("multiply_bf16", bf16)):
        loop = loops.get(probe, loops["multiply_fp32"])
        multiplied = [each for each in loop if re.match(rf"{instruction}.*{register}", each)]
        assert len(multiplied) == chains, loop
        assert len(loop) <= 2 * chains + 4, loop  # SSE2 adds apart
    assert len([each for each in loops["read_all"] if re.search(rf"add.*{register}", each)]) == 8
    for loop in loops.values():
        assert not [each for each in loop if STACK.search(each)], loop


def test_a_spilling_loop_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors of 64 bytes that AVX2 once got."""
    if shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("g++ or objdump is missing")
    wide = probes.SOURCE.replace("constexpr int kBytes = 32;", "constexpr int kBytes = 64;")
    monkeypatch.setattr(probes, "SOURCE", wide)
    probes.build(tmp_path / "probes.so", ("-mavx2", "-mfma"))
    loop = max(inner_loops(tmp_path / "probes.so")["multiply_fp32._omp_fn.0"], key=len)
    assert [each for each in loop if STACK.search(each)]


@pytest.mark.parametrize(("dtype", "least_share"), [(torch.float32, 1 / 3), (torch.bfloat16, 1 / 6)], ids=str)
def test_a_limit_is_what_a_library_nearly_reaches(dtype: torch.dtype, least_share: float) -> None:
    """torch's product of 1024 x 1024, on one thread each, in turns, the best of each side.

    Others' load slows single samples of either side and leaves the best ones; both last about as long. The product has
    edges and packing, so it stays below the probe. More than 1.1 times the probe, and the probe is no limit; less than
    a third (of AMX's tiles a sixth: oneDNN reaches 0.4 of 4.0 TFLOP/s), and it counts what it does not do.
    """
    if dtype == torch.bfloat16 and not machine.multiplies_bf16():
        pytest.skip("this library has no products of bf16 for this CPU")
    found, threads, n = probes.probes(), torch.get_num_threads(), 1024
    a = torch.ones(n, n, dtype=dtype)
    probe = found.multiply_bf16 if dtype == torch.bfloat16 else found.multiply_fp32
    flops = 2 * n**3
    torch.set_num_threads(1)
    try:
        rounds = max(1, flops // probe(1, 1))
        sides: dict[str, Callable[[], object]] = {
            "probe": lambda: probe(rounds, 1),
            "library": lambda: a @ a,
        }
        best = {name: float("inf") for name in sides}
        for turn in range(60):
            for name, run in sides.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
            ratio = best["library"] / best["probe"]
            if turn >= 10 and 0.95 < ratio < 0.85 / least_share:
                break
    finally:
        torch.set_num_threads(threads)
    rates = {name: f"{flops / taken / 1e9:.0f} GFLOP/s" for name, taken in best.items()}
    assert 0.9 < ratio < 1 / least_share, rates


def test_the_loops_say_what_they_are() -> None:
    found = probes.probes()
    flags = set(re.findall(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    names = {
        "amx_bf16": "AMX",
        "avx512_bf16": "AVX-512 BF16",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
        "bf16": "NEON BF16",
        "asimd": "NEON",
    }
    expected = next((name for flag, name in names.items() if flag in flags), found.instructions)
    assert found.instructions == expected
    assert found.bf16_by in {"tdpbf16ps", "vdpbf16ps", "bfdot", "fp32"}


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(probes.NotBuilt, match="g-minus-minus"):
        probes.build(tmp_path / "x.so", compiler="g-minus-minus")
    with pytest.raises(probes.NotBuilt, match="march"):
        probes.build(tmp_path / "x.so", ("-march=the-next-one",))


def test_the_command_says_why_there_are_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(paper: bool) -> None:
        raise probes.NotBuilt("g++ is not there")

    monkeypatch.setattr(bench_limits, "run", cannot)
    result = CliRunner().invoke(app, ["limits"])
    assert result.exit_code == MISUSED
    assert "loraplex: g++ is not there" in result.output
