"""The benchmark of activated LoRAs, for a moment on a tiny base: is what is compared what it says?"""

from __future__ import annotations

import asyncio
from pathlib import Path

from loraplex.benchmarks.activated import ACTIVATED, INVOCATION, PLAIN, QUESTION, make_pair, measure, report
from loraplex.benchmarks.many.served import serve
from loraplex.kernels.constants import BLOCK_SIZE

CONVERSATION = 200


def test_the_activated_one_computes_its_question_alone(tiny_base: Path, tmp_path: Path) -> None:
    make_pair(tiny_base, tmp_path)
    flags = ("--served-model-name", "tiny", "--adapter-dir", str(tmp_path))
    with serve(str(tiny_base), *flags) as server:
        asked = asyncio.run(measure(server, 2, 320, "tiny", CONVERSATION))
    assert [each.adapter for each in asked] == [ACTIVATED, PLAIN, PLAIN, ACTIVATED]
    assert all(each.first > 0 for each in asked)
    whole = CONVERSATION // BLOCK_SIZE * BLOCK_SIZE
    assert [each.cached for each in asked] == [whole, 0, 0, whole]
    assert len(INVOCATION) + QUESTION < BLOCK_SIZE
    assert len(report(asked)) == 3
