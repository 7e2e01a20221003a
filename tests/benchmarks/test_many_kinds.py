"""One batch of every kind, for a moment, on a tiny base: are all kinds there, and do they answer as alone?"""

from __future__ import annotations

import json
from pathlib import Path

from loraplex.adapters.format.kinds import KINDS
from loraplex.benchmarks.many import kinds
from loraplex.benchmarks.many.figures import Report
from loraplex.benchmarks.random_kinds import OPTIONS, write_kinds
from tests.support.tiny import make_tiny_model, make_tiny_tokenizer

FIELDS = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
"""Of a base whose modules blocks of 64 divide."""


def base_at(folder: Path) -> Path:
    return make_tiny_tokenizer(make_tiny_model("llama", folder, **FIELDS))


def test_every_kind_is_made(tmp_path: Path) -> None:
    made = write_kinds(base_at(tmp_path / "base"), tmp_path / "kinds")
    assert made.names == tuple(OPTIONS)
    assert made.left_out == ()
    kinds_made = {
        json.loads((tmp_path / "kinds" / name / "adapter_config.json").read_text())["peft_type"] for name in OPTIONS
    }
    assert kinds_made == {name.upper() for name in KINDS}


def test_all_in_one_batch(tmp_path: Path) -> None:
    report, base = Report(), base_at(tmp_path)
    kinds.run(str(base), base.name, base, report, rounds=1, seconds=0.2)
    assert report.figures["answers in the batch that are not those alone"] == 0
    assert report.figures[f"distinct answers of {len(OPTIONS) + 2} to one prompt"] > len(OPTIONS) / 2
    assert report.figures["every kind, against LoRA alone of as many bytes"] > 0
