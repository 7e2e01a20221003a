"""README's figures are those of the results file, and the GPU's on paper those of the kernels' own traffic."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from loraplex.benchmarks import kept, quantised, readme, serve, short, slora
from loraplex.benchmarks.kept import Results
from loraplex.benchmarks.kernels.gpu_work import Shape
from loraplex.benchmarks.kernels.machine import Limits
from loraplex.benchmarks.kind import Kind, family
from loraplex.benchmarks.least import Load, least_seconds, most_tokens
from loraplex.benchmarks.paper import H100, LLAMA_8B, SMOLLM2_135M, Base, Device, step, table
from loraplex.benchmarks.peers import peer
from loraplex.benchmarks.provenance import commit
from loraplex.kernels.cpu import abi

KIND, OTHER = Kind("x86", "avx2", "AMD Zen 4", 2), Kind("x86", "avx512bf16", "AMD Zen 5", 2)
MEASURED = {
    "measured": {
        **{"cpus": 2, "cpu": "X", "instructions": "AVX2", "system": "Linux x86_64"},
        **{"commit": "abc", "committed": "2026-01-01T10:00:00+00:00", "versions": {"torch": "2.13.0"}},
    },
    "date": "2026-01-01",
}
OLDER = {**MEASURED, "measured": {**MEASURED["measured"], "commit": "old", "committed": "2025-12-31T23:00:00+00:00"}}
BENCH: dict[str, Any] = {
    **MEASURED,
    "rounds": 2,
    "slora_rounds": 1,
    "limits": asdict(Limits(2, 47.6e9, 849e9, 467e9, "AVX2", "fp32", 400e9)),
    "serve": [asdict(serve.Row("base, 1 stream", 123.4, 0.0444, 0.00751, 0.0099, 0.687, 0.034))],
    "quantised": [asdict(quantised.Row("base, 1 stream", 123.0, 284.6, 2.312, 0.914))],
    "slora": [
        asdict(slora.Row("S1", 5, 20.0, 700.0, 0.1, 0.09, 0.2, 0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0)),
        asdict(slora.Row("S1", 2000, 19.0, 670.0, 0.15, 0.12, 0.4, 0, 0.13, 0.48, 0.95, 1.5, 0.945, 3.37)),
    ],
}
PEERS = {
    **MEASURED,
    "peers": {"llama.cpp": {"llama-cpp-python": "0.3.36"}},
    "left_out": {"vllm": "no wheel for here"},
    "rows": [
        {
            "load": "base, 1 stream",
            "rounds": {
                "loraplex": [asdict(peer.Figures(tokens_per_second=rate, first=0.05)) for rate in (100, 120, 110)],
                "llama.cpp": [asdict(peer.Figures(tokens_per_second=rate, first=None)) for rate in (50, 50, 50)],
            },
        }
    ],
}
THOUSAND = {
    **MEASURED,
    "rounds": 1,
    "adapters": 1000,
    "figures": {
        "zipf over 1000, against five": 0.943,
        "uniform over 1000, against five": 0.974,
        "host, against warm": 1.05,
        "disk 1st, against warm": 1.25,
        "p99 beside loads, against requests": 1.131,
        "1000 adapters, all: seconds more": 0.62,
    },
}
RESULTS = Results(KIND, {"bench": BENCH})
TEXT = (
    "# x\n<!-- figures: serve -->\n| old |\n<!-- /figures -->\nbetween\n"
    "<!-- figures: machine -->\n<!-- /figures -->\nend\n"
)


def test_readmes_figures_are_the_results() -> None:
    for path, text in readme.wanted(kept.read_all()).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: python -m loraplex.benchmarks.readme writes it"


def test_every_figure_has_a_place_and_stands_under_its_kind() -> None:
    texts = "".join(path.read_text(encoding="utf-8") for path in readme.TEXTS)
    places = re.findall(r"<!-- figures: (\w+) -->\n(.*?)<!-- /figures -->", texts, re.DOTALL)
    assert {name for name, _ in places} == readme.TABLES.keys()
    results = kept.read_all()
    for name, shown in places:
        for each in results:
            section = each.sections.get(readme.TABLES[name].section, {})
            if readme.TABLES[name].wants in section:
                assert f"**{each.kind}**, commit {section['measured']['commit']}" in shown


def test_kinds_stand_apart_and_the_older_one_says_so() -> None:
    before = {**BENCH, **OLDER, "serve": [{**BENCH["serve"][0], "tokens_per_second": 77.0}]}
    found = readme.tables([RESULTS, Results(OTHER, {"bench": before, "peers": PEERS}, ("A note.",))])
    here, there = found["serve"].split("**AMD Zen 5, AVX-512 BF16, 2 cores**")
    assert here.startswith("**AMD Zen 4, AVX2, 2 cores**, commit abc, 2026-01-01, medians of 2 rounds:\n\n| load |")
    assert "| 123 |" in here
    assert there.startswith(", commit old (older than the code here), 2026-01-01, medians of 2 rounds:\n\n| load |")
    assert "| 77 |" in there
    assert "| 123 |" not in there
    assert found["machine"].count("\n- ") == 1
    assert found["machine"].endswith(" A note.\n")
    assert "one round: Over 2,000" in found["adapters"]
    assert "commit abc, 2026" in found["peers"]
    marked = readme.tables([Results(KIND, {"bench": {**BENCH, "outdated": True}})])
    assert "commit abc (older than the code here), " in marked["serve"]


def test_a_file_from_before_a_table_was_measured_leaves_it_out() -> None:
    before = Results(OTHER, {"bench": {name: content for name, content in BENCH.items() if name != "quantised"}})
    assert "quantised" not in readme.tables([before])
    assert str(OTHER) not in readme.tables([before, RESULTS])["quantised"]


def test_int4_stands_beside_bf16_of_the_same_round() -> None:
    """A machine that others use slows both of a round, and the ratio of medians would mix rounds."""
    rates = ((100.0, 210.0), (50.0, 110.0), (80.0, 160.0))
    rounds = [(peer.Figures(dense, 0.2), peer.Figures(fewer, 0.1)) for dense, fewer in rates]
    assert quantised.Row.of("x", rounds) == quantised.Row("x", 80.0, 160.0, 2.1, 0.5)


def test_a_share_above_the_limit_is_not_shown_without_saying_so() -> None:
    rows = [{**BENCH[name][0], "of_limit": 1.25} for name in ("serve", "slora")]
    found = readme.tables([Results(KIND, {"bench": {**BENCH, "serve": rows[:1], "slora": [*rows[1:]] * 2}})])
    for name in ("serve", "slora"):
        assert "125% (the limit is wrong) |" in found[name]


def test_the_peers_table() -> None:
    text = readme.tables([Results(KIND, {"peers": PEERS})])["peers"]
    assert "| base, 1 stream | 110, 50 ms | 50 (2.20) |" in text
    assert "medians of 3 rounds:\n" in text
    assert text.endswith("\n\nllama.cpp llama-cpp-python 0.3.36; vllm is left out: no wheel for here.\n")
    before = "<!-- figures: peers -->\nas it was\n<!-- /figures -->"
    assert readme.fill(before, readme.tables([RESULTS])) == before
    assert "as it was" not in readme.fill(before, {"peers": text})


def test_the_table_of_settings() -> None:
    section = {**MEASURED, "rounds": 2, "slora": BENCH["slora"]}
    text = readme.tables([Results(KIND, {"settings": section})])["settings"]
    assert text.startswith("**AMD Zen 4, AVX2, 2 cores**, commit abc, 2026-01-01, medians of 2 rounds:\n")
    assert "| S1 | 2,000 | 19.00 | 0.950 | 0.945 |" in text


def test_the_sentences_of_a_thousand() -> None:
    text = readme.tables([Results(KIND, {"thousand": THOUSAND})])["thousand"]
    for said in ("generates 0.94 of", "uniformly 0.97.", "takes 1.05 times", "1.25 times", "1.13 times", "0.6 s later"):
        assert said in text
    assert text.startswith("- **AMD Zen 4, AVX2, 2 cores**, commit abc, 2026-01-01, one round: Over all")


def test_tables_take_their_places_and_nothing_else_changes() -> None:
    found = readme.tables([RESULTS])
    filled = readme.fill(TEXT, found)
    assert "| base, 1 stream | 123 | 69% | 44 ms | 7.5 ms | 9.9 ms |" in filled
    assert "48 GB/s read from memory, 849 GFLOP/s in bf16 by loops in AVX2" in filled
    assert "other processes took up to 3%" in filled
    assert "old" not in filled
    assert filled.startswith("# x\n<!-- figures: serve -->\n")
    assert "\nbetween\n" in filled
    assert filled.endswith("<!-- /figures -->\nend\n")
    assert readme.fill(filled, found) == filled
    assert "| S1 | 2,000 | 19.00 | 0.950 | 0.945 | 150 ms | 1.50 | 3.37 | 13% | 48% |" in found["slora"]
    assert "Over 2,000 adapters it answers 19.0 requests/s, 0.950 of what it does over 5; 13%" in found["adapters"]
    assert found["adapters"].endswith("The paper has 0.945 and 3.37 for the same counts.\n")
    with pytest.raises(readme.NoFigures, match="'cluster'"):
        readme.fill("<!-- figures: cluster -->\n<!-- /figures -->", found)


# ---- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17"}, "AMD Zen 4"),  # EPYC 9004
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "1"}, "AMD Zen 3"),  # EPYC 7003
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "33"}, "AMD Zen 3"),  # Ryzen 5000
        ({"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "97"}, "AMD Zen 4"),  # Ryzen 7000
        ({"vendor_id": "AuthenticAMD", "cpu family": "23", "model": "49"}, "AMD Zen 2"),  # EPYC 7002
        ({"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2"}, "AMD Zen 5"),  # EPYC 9005
        ({"vendor_id": "AuthenticAMD", "cpu family": "27", "model": "2"}, "AMD family 27 model 2"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "143"}, "Intel Sapphire Rapids"),
        ({"vendor_id": "GenuineIntel", "cpu family": "6", "model": "154"}, "Intel Alder Lake"),
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "Neoverse V1"),
        ({"CPU implementer": "0x61", "CPU part": "0x022"}, "ARM 0x61 part 0x022"),
        ({"cpu": "POWER9"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_family_by_its_numbers(lines: dict[str, str], expected: str) -> None:
    assert family(lines) == expected


def test_a_kind_names_a_file_and_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KIND.slug == "x86-avx2-amd-zen4-2c"
    assert Kind("arm64", "neonbf16", "Neoverse V1", 64).slug == "arm64-neonbf16-neoverse-v1-64c"
    assert str(Kind("x86", "generic", "AMD family 27 model 2", 1)) == "AMD family 27 model 2, generic, 1 core"
    here = Kind.here()
    assert here.cores == len(os.sched_getaffinity(0))
    assert here.kernels == abi.pick_isa()[1]
    assert Kind.from_json(json.loads(json.dumps(here.as_json()))) == here
    assert re.fullmatch(r"[a-z0-9-]+", here.slug)
    monkeypatch.setenv("LORAPLEX_ISA", "generic")
    assert Kind.here().kernels == "generic"


def test_a_section_is_kept_beside_the_others_of_its_kind_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kind, "here", classmethod(lambda cls: KIND))
    (tmp_path / "steps.json").write_text("{}")
    first = {**BENCH, "outdated": True}
    (tmp_path / f"{KIND.slug}.json").write_text(
        json.dumps({"kind": KIND.as_json(), "notes": ["A note."], "bench": first})
    )
    kept.write("peers", {"rows": []}, tmp_path)
    (found,) = kept.read_all(tmp_path)
    assert found.kind == KIND
    assert found.notes == ["A note."]
    assert found.sections["bench"] == first
    assert found.sections["peers"]["rows"] == []
    assert found.sections["peers"]["measured"].keys() >= {"cpu", "commit", "committed", "versions"}

    kept.write("bench", {"rounds": 3}, tmp_path)
    (found,) = kept.read_all(tmp_path)
    assert found.notes == ()  # it was of what is gone
    assert found.sections["bench"]["rounds"] == 3
    assert "outdated" not in found.sections["bench"]

    monkeypatch.setattr(Kind, "here", classmethod(lambda cls: OTHER))
    before = (tmp_path / f"{KIND.slug}.json").read_text()
    kept.write("bench", {"rounds": 1}, tmp_path)
    assert (tmp_path / f"{KIND.slug}.json").read_text() == before
    assert {each.kind for each in kept.read_all(tmp_path)} == {KIND, OTHER}


def test_what_was_kept_says_where_it_comes_from() -> None:
    for path in kept.FOLDER.glob("*-*.json"):
        found = kept.Results.read(path)
        assert path.stem == found.kind.slug
        for section in found.sections.values():
            assert section["measured"]["commit"]
            assert datetime.fromisoformat(section["measured"]["committed"])


# ---- the plot, the paper, least times -------------------------------------------------------------------------------


def test_the_plot_is_a_file_of_its_own() -> None:
    """An image that a page of Markdown shows: well-formed, with a namespace, and nothing to load."""
    text = slora.plot([slora.Row(**row) for row in BENCH["slora"]])
    drawn = ElementTree.fromstring(text)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    lines = [each for each in drawn.iter() if each.tag.endswith("polyline")]
    assert len(lines) == 4  # ours and the paper's, of both figures
    ours, theirs = (
        [tuple(map(float, point.split(","))) for point in each.get("points", "").split()] for each in lines[:2]
    )
    assert [x for x, _ in ours] == [x for x, _ in theirs]
    assert ours[1][1] < theirs[1][1]  # 0.95 is drawn above 0.945: y points down
    assert "nan" not in text
    assert not re.search(r"(href=|url\(|@import|<script)", text)


def test_what_the_paper_says_of_its_own_loss() -> None:
    """5.5 % from 5 to 2000 adapters of rank 8, 10 % of mixed ranks."""
    rates = {setting: {count: rate for count, (rate, _) in found.items()} for setting, found in slora.PAPER.items()}
    assert rates["S1"][2000] / rates["S1"][5] == pytest.approx(1 - 0.055, abs=0.001)
    assert rates["S2"][2000] / rates["S2"][5] == pytest.approx(0.9, abs=0.002)


def test_the_least_time_of_a_load_by_hand() -> None:
    """A base of one layer of 2 x 2 on everything and a vocabulary of 3, 2 streams of 4 tokens in and 3 out."""
    base = Base(Shape("tiny", 2, 2, 1, 1, 2), 1, 3)
    layers = 4 * 2 * 2 + 3 * 2 * 2  # q, k, v, o; gate, up, down
    assert base.weights == layers + 3 * 2
    load = Load(streams=2, adapters=1, elements=10, prompt=4, output=3)
    attention = 4 * 4 * 2  # flops of a row at 4 tokens: two products of 4 tokens by 2 columns
    prompts = 2 * (2 * (layers + 6) + 2 * 10 + attention) + 2 * 3 * (2 * layers + 2 * 10)
    slow_arithmetic = Device("d", read=1e30, bf16=1.0)
    steps = 2 * 2 * (2 * (layers + 6) + 2 * 10 + 4 * 5 * 2)
    assert least_seconds(base, load, slow_arithmetic) == pytest.approx(prompts + steps)
    slow_memory = Device("d", read=1.0, bf16=1e30)
    weights, adapters, kv = 2 * (layers + 6), 2 * 10, 2 * 2 * (2 * 5 * 2)
    assert least_seconds(base, load, slow_memory) == pytest.approx(weights + adapters + 2 * (weights + adapters + kv))
    assert most_tokens(base, load, slow_memory) == pytest.approx(6 / least_seconds(base, load, slow_memory))
    without = replace(load, adapters=0)
    assert least_seconds(base, without, slow_memory) == pytest.approx(weights + 2 * (weights + kv))
    assert least_seconds(base, without, slow_arithmetic) == pytest.approx(prompts + steps - 20 * (2 + 6 + 4))


def test_the_demo_base_has_the_parameters_its_makers_state() -> None:
    """134,515,008: the embedding, which is the head, and 61 norms of 576 are not all in a step's products."""
    assert SMOLLM2_135M.weights + 61 * 576 == 134_515_008


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


def test_the_table_on_paper_is_the_documents() -> None:
    assert len(table()) == 2 + 8
    assert "\n".join(table()) in (readme.ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


COUNTED = """
import json, torch
from loraplex.benchmarks.kernels.gpu_work import SMOLLM2, make_work, run_adapters
from loraplex.benchmarks.kernels import traffic
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
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    base = Base(SMOLLM2_135M.shape, 1, 0)
    added = found["6"] - found["2"]
    expected = step(base, 6).adapter_bytes - step(base, 2).adapter_bytes
    assert expected < added < 1.2 * expected  # rows themselves, their partial sums and the tile table are the rest


def test_what_make_bench_runs_fills_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands of the Makefile, with measuring replaced by what it would have returned."""
    rows = [slora.Row(**row) for row in BENCH["slora"]]
    served = [replace(serve.Row(**row), of_limit=1.25) for row in BENCH["serve"]]
    monkeypatch.setattr(short, "limits", lambda: Limits(**BENCH["limits"]))
    monkeypatch.setattr(serve, "run", lambda rounds: served)
    monkeypatch.setattr(quantised, "run", lambda rounds: [quantised.Row(**row) for row in BENCH["quantised"]])
    monkeypatch.setattr(slora, "run", lambda setting, counts, seconds, rounds: rows)
    results, texts = tmp_path / "results", (tmp_path / "README.md", tmp_path / "benchmarks.md")
    for place, source in zip(texts, readme.TEXTS, strict=True):
        place.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(readme, "TEXTS", texts)
    monkeypatch.setattr(readme, "PLOTS", tmp_path)

    monkeypatch.setattr(sys, "argv", ["short", "--out", str(results), "--rounds", "2"])
    short.main()
    (path,) = results.iterdir()
    kind = Kind.here()
    assert path.name == f"{kind.slug}.json"
    bench = json.loads(path.read_text(encoding="utf-8"))["bench"]
    measured = bench["measured"]
    assert bench["limits"]["instructions"] == "AVX2"
    assert bench["limit_is_wrong"] == ["base, 1 stream"]
    monkeypatch.setattr(sys, "argv", ["readme", "--check", "--results", str(results)])
    with pytest.raises(SystemExit, match=r"slora-.*\.svg: not what the results say"):
        readme.main()
    monkeypatch.setattr(sys, "argv", ["readme", "--results", str(results)])
    readme.main()
    first, second = (place.read_text(encoding="utf-8") for place in texts)
    assert "| base, 1 stream | 123 | 125% (the limit is wrong) |" in first
    assert "| base, 1 stream | 123 | 285 | 2.31 | 0.91 |" in first
    assert "Over 2,000 adapters it answers" in first
    assert f"{measured['cpus']} CPUs of {measured['cpu']}" in first
    assert f"**{kind}**, commit {measured['commit']}, " in first
    assert "| S1 | 2,000 |" in second
    assert f"](slora-{kind.slug}.svg)" in second
    assert (tmp_path / f"slora-{kind.slug}.svg").read_text(encoding="utf-8") == slora.plot(rows)
    monkeypatch.setattr(sys, "argv", ["readme", "--check", "--results", str(results)])
    with pytest.raises(SystemExit) as checked:
        readme.main()
    assert not checked.value.code
