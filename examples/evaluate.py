"""Asks a running server the held-out questions, of the base and of every example adapter, and prints the scores.

    loraplex serve demo --adapter-dir examples/adapters
    python examples/evaluate.py

Greedy answers over the OpenAI API. The requests for all models go out interleaved, so they share the server's batches.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scoring import HINTS, MANNERS, MAX_TOKENS, SCORES, SKILLS

DATA = Path(__file__).parent / "data"
# The base twice: asked as the adapters are, and told besides what form the answer should have.
ROWS = ("base", "base told", *SKILLS)


@dataclass(frozen=True)
class Question:
    skill: str  # whose held-out set it is from
    prompt: str
    expected: str


@dataclass(frozen=True)
class Answer:
    model: str  # one of ROWS
    skill: str
    prompt: str
    expected: str
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="questions of each adapter's own set (default: all)")
    parser.add_argument("--cross", type=int, default=12, help="questions of each other set (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way at once (default: %(default)s)")
    parser.add_argument("--answers", type=Path, help="JSONL file to write every answer to")
    args = parser.parse_args()
    answers = ask_all(args.url.rstrip("/"), args.limit, args.cross, args.concurrency)
    if args.answers:
        args.answers.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers), encoding="utf-8")
    print("Score of each model (row) on each held-out set (column):\n")
    print(table(answers, lambda answer, skill: answer.skill == skill, score))
    print("\nShare of all its answers that are in each manner, whatever was asked:\n")
    print(table(answers, lambda answer, skill: True, lambda answer, skill: float(MANNERS[skill](answer.text))))


def ask_all(url: str, limit: int | None, cross: int, concurrency: int) -> list[Answer]:
    """Every question of the plan, asked with at most `concurrency` requests under way."""
    base = base_name(url)
    held_out = {skill: read_questions(skill) for skill in SKILLS}
    plan = [
        (model, question)
        for skill, questions in held_out.items()
        for model in ROWS
        for question in questions[: limit if model == skill or model not in SKILLS else cross]
    ]
    plan.sort(key=lambda job: held_out[job[1].skill].index(job[1]))  # stable: the models take turns

    def answer(job: tuple[str, Question]) -> Answer:
        model, question = job
        hint = f"\n{HINTS[question.skill]}" if model == "base told" else ""
        text = ask(url, model if model in SKILLS else base, question, hint)
        return Answer(model, **asdict(question), text=text)

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(answer, plan))


def read_questions(skill: str) -> list[Question]:
    lines = (DATA / f"{skill}.eval.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [Question(skill, user["content"], assistant["content"]) for user, assistant in chats]


def base_name(url: str) -> str:
    """What the server calls the base: the model without a parent."""
    models = _call(f"{url}/v1/models", None)["data"]
    missing = set(SKILLS) - {model["id"] for model in models}
    if missing:
        raise SystemExit(f"{url} does not serve {', '.join(sorted(missing))}; start it with --adapter-dir")
    return next(model["id"] for model in models if not model.get("parent"))


def ask(url: str, model: str, question: Question, hint: str = "") -> str:
    """The greedy answer to the question, with `hint` after it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.prompt + hint}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS[question.skill],
    }
    return _call(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]


def score(answer: Answer, skill: str) -> float:
    return SCORES[skill](answer.text, answer.expected)


def table(
    answers: Iterable[Answer],
    chosen: Callable[[Answer, str], bool],
    value: Callable[[Answer, str], float],
) -> str:
    """Means over the chosen answers, one row a model and one column a skill, in Markdown."""
    rows = [f"| {'':9} | " + " | ".join(f"{skill:>9}" for skill in SKILLS) + " |", "|---|" + "---:|" * len(SKILLS)]
    for model in ROWS:
        cells = []
        for skill in SKILLS:
            values = [value(answer, skill) for answer in answers if answer.model == model and chosen(answer, skill)]
            cells.append(f"{sum(values) / len(values):9.2f}" if values else f"{'-':>9}")
        rows.append(f"| {model:9} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _call(url: str, body: dict[str, Any] | None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{url}: {error.code} {error.read().decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        raise SystemExit(f"{url}: {error.reason}; is the server running?") from error


if __name__ == "__main__":
    main()
