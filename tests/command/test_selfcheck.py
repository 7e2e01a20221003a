"""`selfcheck` on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraplex.kernels.reference import ReferenceBackend
from loraplex.kernels.select import load_backend
from loraplex.server.command import selfcheck


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert selfcheck.selfcheck("cuda") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "no GPU" in told.err
    assert told.err.count("\n") == 1


def test_the_report_on_a_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "seconds", lambda work, device: 1e-6 * (work() is not None))
    assert selfcheck.selfcheck("cpu") == 0
    report = capsys.readouterr().out
    assert "backend cpu" in report
    assert "ok   ops, SmolLM2-135M, bfloat16" in report
    assert "ok   end to end" in report
    assert "32 decode rows, 32 adapters" in report
    assert "ok   ops, Phi-3-mini, float32" in report
    assert "ok   adapters of ranks 1 to 256, bfloat16" in report
    assert "ok   quantised linears, bfloat16" in report
    assert report.endswith("16 of 16 checks passed\n")


def test_a_wrong_op_fails_the_report_and_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Wrong(ReferenceBackend):
        def act_mul(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
            return super().act_mul(gate_up, activation) * 1.1

    monkeypatch.setattr(selfcheck, "load_backend", lambda name, device: _Wrong(torch.device("cpu")))
    monkeypatch.setattr(selfcheck, "benchmarks", lambda ops: [])
    monkeypatch.setattr(selfcheck, "end_to_end", lambda ops: "")
    monkeypatch.setattr(selfcheck, "SHAPES", (selfcheck.SMOLLM2,))
    monkeypatch.setattr(selfcheck, "RANKS", (16,))
    assert selfcheck.selfcheck("cpu") == 1
    report = capsys.readouterr().out
    assert "FAIL ops, SmolLM2-135M, float32" in report
    assert "is off by" in report


def test_the_kernel_tests_are_run_and_their_failures_named(tmp_path: Path) -> None:
    assert (selfcheck.KERNEL_TESTS / "conftest.py").exists()
    tests = tmp_path / "tests" / "kernels"
    tests.mkdir(parents=True)
    (tests / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('b', ['cuda', 'cpu'])\ndef test_some(b):\n    assert b == 'cuda'\n"
    )
    assert selfcheck.kernel_tests(tests, "cuda").startswith("1 passed")
    with pytest.raises(AssertionError, match=r"1 failed.*FAILED .*test_some\[cpu\]"):
        selfcheck.kernel_tests(tests, "cpu")


def test_seconds_measures() -> None:
    assert selfcheck.seconds(lambda: sum(range(100_000)), torch.device("cpu")) > 1e-5
    assert load_backend("auto", "cpu").name == "cpu"
