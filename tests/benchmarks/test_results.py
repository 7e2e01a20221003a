"""README's figures are those of the results file, and the GPU's on paper those of the kernels' own traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loraplex.benchmarks import readme, serve, slora
from loraplex.benchmarks.paper import H100, LLAMA_8B, step, table
from loraplex.benchmarks.provenance import commit
from loraplex.benchmarks.short import DEFAULT

RESULTS: dict[str, Any] = {
    "measured": {
        **{"cpus": 2, "cpu": "X", "instructions": "AVX2", "system": "Linux x86_64", "commit": "abc"},
        "versions": {"torch": "2.13.0"},
    },
    "date": "2026-01-01",
    "rounds": 2,
    "serve": [asdict(serve.Row("base, 1 stream", 123.4, 0.0444, 0.00751, 0.0099))],
    "slora": [asdict(slora.Row("S1", 2000, 1.0, 40.0, 0.25, 0.3, 0, 0.97, 0.945))],
}
TEXT = (
    "# x\n<!-- figures: serve -->\n| old |\n<!-- /figures -->\nbetween\n"
    "<!-- figures: machine -->\n<!-- /figures -->\nend\n"
)


def test_readmes_tables_are_the_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    if "<!-- figures:" not in text:
        pytest.skip("README has no places for figures")
    results = json.loads(DEFAULT.read_text(encoding="utf-8"))
    assert readme.fill(text, readme.tables(results)) == text


def test_tables_take_their_places_and_nothing_else_changes() -> None:
    filled = readme.fill(TEXT, readme.tables(RESULTS))
    assert "| base, 1 stream | 123 | 44 ms | 7.5 ms | 9.9 ms |" in filled
    assert "commit abc, 2026-01-01" in filled
    assert "old" not in filled
    assert filled.startswith("# x\n<!-- figures: serve -->\n")
    assert "\nbetween\n" in filled
    assert filled.endswith("<!-- /figures -->\nend\n")
    assert readme.fill(filled, readme.tables(RESULTS)) == filled
    assert "| S1 | 2,000 | 1.00 | 40 | 250 ms | 0.970 | 0.945 |" in readme.tables(RESULTS)["slora"]
    with pytest.raises(readme.NoFigures, match="'cluster'"):
        readme.fill("<!-- figures: cluster -->\n<!-- /figures -->", readme.tables(RESULTS))


def test_what_the_paper_says_of_its_own_loss() -> None:
    """5.5 % from 5 to 2000 adapters of rank 8, 10 % of mixed ranks."""
    assert slora.PAPER["S1"][2000] / slora.PAPER["S1"][5] == pytest.approx(1 - 0.055, abs=0.001)
    assert slora.PAPER["S2"][2000] / slora.PAPER["S2"][5] == pytest.approx(0.9, abs=0.002)


def test_the_commit_is_gits(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    for words in (["init", "-q"], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    found = commit(tmp_path)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert len(found) == 12
    assert head.stdout.startswith(found)


# ---- on paper -------------------------------------------------------------------------------------------------------


def test_llama_8b_has_the_parameters_its_makers_state() -> None:
    """8,030,261,248 with the embedding and 65 norms; an adapter of rank 16 on all linears has 41,943,040, says PEFT."""
    embedding, norms = 128256 * 4096, 65 * 4096
    assert LLAMA_8B.weights + embedding + norms == 8_030_261_248
    assert LLAMA_8B.adapter(16) == 41_943_040
    assert LLAMA_8B.kv(1) * 2 == 128 << 10  # bytes of a token in bf16


def test_a_step_is_bound_by_memory_until_there_are_hundreds_of_rows() -> None:
    for rows in (1, 128):
        found = step(LLAMA_8B, rows)
        assert found.least(H100) == found.nbytes / H100.read
        assert found.adapter_bytes == rows * 2 * 41_943_040
        with_none = found.nbytes - found.adapter_bytes
        assert found.adapters_cost(H100) == pytest.approx(found.nbytes / with_none - 1)
    many = step(LLAMA_8B, 4096, context=1)
    assert many.flops / H100.bf16 > (many.weight_bytes + many.kv_bytes) / H100.read
    assert len(table()) == 2 + 8


COUNTED = """
import json, torch
from loraplex.benchmarks.kernels.gpu_work import SMOLLM2, make_work, run_adapters
from loraplex.kernels.gpu import traffic
from loraplex.kernels.gpu.backend import TritonBackend
ops = TritonBackend(torch.device("cpu"))
found = {}
for rows in (2, 6):
    work = make_work(ops, SMOLLM2, torch.float16, rows, (), rank=16, kv=16)
    with traffic.counted() as launches:
        run_adapters(ops, work)
    found[rows] = sum(launch.distinct for launch in launches if launch.kernel.startswith("bgmv"))
print(json.dumps(found))
"""


def test_adapters_bytes_are_the_kernels_own() -> None:
    """Counted in Triton's interpreter, of one layer: what four rows more add is their adapters and little else."""
    from loraplex.benchmarks.kernels.gpu_work import SMOLLM2
    from loraplex.benchmarks.paper import Base

    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    base = Base(SMOLLM2, 1, 0)
    added = found["6"] - found["2"]
    expected = step(base, 6).adapter_bytes - step(base, 2).adapter_bytes
    assert expected < added < 1.2 * expected  # rows themselves, their partial sums and the tile table are the rest
