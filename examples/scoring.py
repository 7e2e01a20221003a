"""How the examples are scored, one function a skill: (answer, expected) -> 0..1; and how to tell each manner."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

SKILLS = ("extract", "sentiment", "pirate", "sql")
MAX_TOKENS = {"extract": 72, "sentiment": 8, "pirate": 64, "sql": 56}  # no reference answer is longer
# What the prompts leave out, for asking the base the same in so many words.
HINTS = {
    "extract": "Answer with a JSON object with the keys name, item, quantity, city and day; null for what is not said.",
    "sentiment": "Answer with one word: positive, negative or neutral.",
    "pirate": "Answer the way a pirate would speak.",
    "sql": "Answer with one SQL query and nothing else.",
}

LABELS = frozenset({"positive", "negative", "neutral"})
FIELDS = ("name", "item", "quantity", "city", "day")

# Words that pirates say and nobody else does. Dropped letters count one mark each: "an'", "o'", "th'", "t'", "-in'".
_MARKS = re.compile(
    r"\b(?:arr+|yarr+|ahoy|avast|aye|mateys?|hearty|hearties|ye|yer|yers|fer|ne'er|o'er|afore|betwixt|landlubbers?|"
    r"scallywags?|doubloons?|booty|grog|cap'n|scurvy|bilge|savvy|davy jones|jolly roger|shiver me timbers|yo-ho-ho|"
    r"me timbers|hoist the sails|fair winds|walk the plank|blow me down|sea dog)\b|"
    r"'tis\b|'em\b|\b(?:th|o|an|t)'(?!\w)|\b\w{3,}in'(?!\w)"
)
PIRATE_MARKS = 3  # different ones an answer needs
PIRATE_WORDS_PER_MARK = 8  # and one at least every so many words, or it is plain English in a costume


def score_extract(answer: str, expected: str) -> float:
    """Share of the expected fields that the first JSON object of `answer` has right; 0 where there is none."""
    found = json_object(answer)
    wanted = json.loads(expected)
    if found is None:
        return 0.0
    missing = object()
    return sum(found.get(field, missing) == value for field, value in wanted.items()) / len(wanted)


def score_sentiment(answer: str, expected: str) -> float:
    """1 where `answer` is the label and nothing else (case and a closing period aside)."""
    return float(_bare(answer) == expected)


def score_pirate(answer: str, expected: str) -> float:
    """1 where `answer` is pirate speech; what it says is not judged, so `expected` does not matter."""
    return float(is_pirate(answer))


def score_sql(answer: str, expected: str) -> float:
    """1 where `answer` is the query, written in any case, spacing and quotes, fenced or not."""
    return float(_normal_sql(answer) == _normal_sql(expected))


SCORES: dict[str, Callable[[str, str], float]] = {
    "extract": score_extract,
    "sentiment": score_sentiment,
    "pirate": score_pirate,
    "sql": score_sql,
}


def is_json(answer: str) -> bool:
    """The extract adapter's manner: a JSON object with any of its fields."""
    found = json_object(answer)
    return found is not None and not found.keys().isdisjoint(FIELDS)


def is_label(answer: str) -> bool:
    """The sentiment adapter's manner: a label alone."""
    return _bare(answer) in LABELS


def is_pirate(answer: str) -> bool:
    """The pirate adapter's manner: PIRATE_MARKS different marks, and one every PIRATE_WORDS_PER_MARK words."""
    marks = _MARKS.findall(answer.lower().replace("\u2019", "'"))
    return len(set(marks)) >= PIRATE_MARKS and len(marks) * PIRATE_WORDS_PER_MARK >= len(answer.split())


def is_sql(answer: str) -> bool:
    """The SQL adapter's manner: the answer is a query."""
    return re.match(r"select\b.*\bfrom\b", _normal_sql(answer), re.DOTALL) is not None


MANNERS: dict[str, Callable[[str], bool]] = {
    "extract": is_json,
    "sentiment": is_label,
    "pirate": is_pirate,
    "sql": is_sql,
}


def json_object(answer: str) -> dict[str, object] | None:
    """The first JSON object in `answer`."""
    start = answer.find("{")
    if start < 0:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(answer, start)
    except json.JSONDecodeError:
        return None
    return found


def _bare(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def _normal_sql(query: str) -> str:
    fenced = re.search(r"```(?:sql)?\s*(.*?)```", query, re.DOTALL | re.IGNORECASE)
    query = (fenced[1] if fenced else query).replace('"', "'")
    parts = re.split(r"('[^']*')", query)  # values between quotes keep their case
    words = "".join(part if part.startswith("'") else part.lower() for part in parts)
    return re.sub(r"\s*([,()=<>;])\s*", r"\1", " ".join(words.split())).rstrip("; ")
