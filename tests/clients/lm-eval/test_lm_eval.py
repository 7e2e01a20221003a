"""EleutherAI's harness over /v1/completions: what it finds is what transformers and PEFT computed (reference.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TASKS = ("choose", "perplexity", "generate")
CLOSE = 2e-3
"""Sums of a few dozen log-probabilities in fp32, each summed in another order."""


def evaluate(url: str, model: str, out: Path, batch_size: int, **settings: Any) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task, by document: what `lm_eval` itself writes down."""
    arguments = {"model": model, "base_url": f"{url}/v1/completions", "max_length": 128, **settings}
    command = [Path(sys.executable).with_name("lm_eval"), "run", "--model", "local-completions", "--model_args"]
    done = subprocess.run(
        [
            *command,
            ",".join(f"{name}={value}" for name, value in arguments.items()),
            *("--include_path", HERE / "tasks", "--tasks", ",".join(TASKS)),
            *("--batch_size", str(batch_size)),
            *("--log_samples", "--output_path", out),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[task] = sorted(lines, key=lambda sample: sample["doc_id"])
    return found


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, list[Any]]]:
    return json.loads(Path(os.environ["LORAPLEX_REFERENCE"]).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("tiny", {"batch_size": 1}),  # the tokenizer is the server's: GET /tokenizer_info, POST /tokenize
        ("wide", {"batch_size": 4, "tokenizer_backend": "remote"}),
    ],
)
def test_scores_are_those_of_transformers(
    model: str, settings: dict[str, Any], url: str, reference: dict[str, dict[str, list[Any]]], tmp_path: Path
) -> None:
    found, expected = evaluate(url, model, tmp_path, **settings), reference[model]

    chosen = [[(float(score), greedy == "True") for ((score, greedy),) in s["resps"]] for s in found["choose"]]
    assert len(chosen) == len(expected["choose"]) == 5
    for doc, wanted in zip(chosen, expected["choose"], strict=True):
        assert [score for score, _ in doc] == pytest.approx([score for score, _ in wanted], abs=CLOSE)
        assert [greedy for _, greedy in doc] == [greedy for _, greedy in wanted]

    texts = [float(sample["resps"][0][0]) for sample in found["perplexity"]]
    assert texts == pytest.approx(expected["perplexity"], abs=CLOSE)

    assert [sample["resps"][0][0] for sample in found["generate"]] == expected["generate"]


def test_the_adapter_changes_the_scores(reference: dict[str, dict[str, list[Any]]]) -> None:
    """Or the other test would show little about it."""
    base, worn = (reference[model]["perplexity"] for model in ("tiny", "wide"))
    assert all(abs(one - other) > 100 * CLOSE for one, other in zip(base, worn, strict=True))
