"""Builds the CPU kernels: one shared library, kernels.cpp in it for each instruction set."""

import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "kernels/cpu"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
X86 = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DFETCH_ONCE_FOR_L2"],
}
ARM = {"neonbf16": ["-march=armv8.2-a+bf16"]}
# The same again with lines that are read once fetched for L2: on Intel's CPUs those are what runs (vec.h: kOnce).
X86 |= {f"{isa}_l2": [*flags, "-DFETCH_ONCE_FOR_L2"] for isa, flags in X86.items() if isa != "amx"}
ISAS = {"generic": [], **{"x86_64": X86, "aarch64": ARM}.get(platform.machine(), {})}
# No standard-library templates cross instruction sets (vec.h says why), so no exceptions and no RTTI either.
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wno-psabi"]
# Scheduled before registers are given out (GCC does it on arm64), tiles that fill the registers keep sums on the stack.
KERNELS = ["-O2", "-fno-schedule-insns", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"]


class BuildKernels(build_ext):
    """Writes constants.h, compiles kernels.cpp per instruction set, in parallel, and links them with library.cpp."""

    def build_extension(self, ext: Extension) -> None:
        from concurrent.futures import ThreadPoolExecutor

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            name, source, flags = job
            return self.compiler.compile(
                [source],
                output_dir=f"{self.build_temp}/{name}",
                include_dirs=[self.build_temp],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )

        header = Path(self.build_temp, "constants.h")
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(runpy.run_path("kernels/constants.py")["C_HEADER"], encoding="utf-8")
        jobs = [
            (isa, f"{FOLDER}/kernels.cpp", [*KERNELS, f"-DLORAPLEX_ISA={isa}", *flags]) for isa, flags in ISAS.items()
        ]
        jobs.append(("library", f"{FOLDER}/library.cpp", ["-O2", "-fopenmp"]))
        jobs += [(Path(source).stem, source, ["-O3", "-pthread"]) for source in LOADING]
        with ThreadPoolExecutor() as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), libraries=["stdc++", "m"], extra_postargs=["-fopenmp", "-pthread"]
        )


PARTS = (
    *("vec", "amx", "records", "linear", "packing", "inputs", "numbers", "matrix_units", "quant4", "quant8", "exact"),
    *("quantised", "own_table", "rowwise", "sampling", "tiles", "bgmv", "sgmv", "own", "rotate", "kv_pages"),
    "attention",
)
LOADING = ("adapters/image/packing.cpp", "adapters/image/hashing.cpp")
HEADERS = [*(f"{FOLDER}/{part}.h" for part in PARTS), "adapters/image/background.h", "kernels/constants.py"]
SOURCES = [f"{FOLDER}/kernels.cpp", f"{FOLDER}/library.cpp", *LOADING]

if sys.platform != "linux":
    sys.exit("loraplex builds its CPU kernels with g++ on Linux only")

setup(
    ext_modules=[Extension("loraplex.kernels.cpu._kernels", SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": BuildKernels},
)
