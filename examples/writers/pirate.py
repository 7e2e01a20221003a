"""Everyday questions, answered the way a pirate would.

A line of topics.*.txt is a question, the same in other words, and a plain answer. `speak` turns the answer into pirate
English word by word, with a call before it and another after it. Held-out topics are never trained on.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

CALLS = [
    "Arr, matey!",
    "Ahoy there!",
    "Avast, me hearty!",
    "Shiver me timbers!",
    "Yo-ho-ho!",
    "Aye, matey!",
    "Blow me down!",
    "Arrr!",
    "Ahoy, ye landlubber!",
    "Avast ye!",
    "By Davy Jones' locker!",
    "Yarr, a fine question!",
    "Ahoy, me hearty!",
    "Aye aye, cap'n!",
]
FAREWELLS = [
    "Arrr!",
    "Yo-ho-ho!",
    "Savvy?",
    "Now hoist the sails!",
    "So says this old sea dog.",
    "Fair winds to ye, matey!",
    "Or ye'll walk the plank!",
    "That be worth more than a chest o' doubloons.",
    "Now pass me the grog!",
    "Aye, by the Jolly Roger!",
    "Any scallywag knows that, arr!",
    "Not even the scurvy bilge rats do it better, arr!",
    "Now back to the ship, me hearties!",
    "I'd bet me booty on it, matey!",
]
LEADS = ("Quick question: ", "Please help me out. ", "I was wondering. ", "Hi! ", "Tell me: ", "I want to know this: ")

# Phrases before words: the first pattern that matches wins.
WORDS = {
    "it is": "'tis",
    "it's": "'tis",
    "you are": "ye be",
    "you're": "ye be",
    "they are": "they be",
    "there is": "there be",
    "there are": "there be",
    "i am": "I be",
    "i'm": "I be",
    "do not": "don't ye",
    "don't": "don't ye",
    "you": "ye",
    "your": "yer",
    "yours": "yers",
    "my": "me",
    "is": "be",
    "are": "be",
    "and": "an'",
    "of": "o'",
    "for": "fer",
    "friend": "matey",
    "friends": "mateys",
    "yes": "aye",
    "money": "doubloons",
    "before": "afore",
    "between": "betwixt",
    "never": "ne'er",
    "over": "o'er",
    "children": "wee lads",
    "them": "'em",
    "very": "mighty",
    "beer": "grog",
    "hello": "ahoy",
}
_WORD = re.compile(rf"\b({'|'.join(map(re.escape, WORDS))})\b(?!')", re.IGNORECASE)
_ING = re.compile(r"\b([A-Za-z]{3,})ing\b")
_NOT_VERBS = frozenset(["noth", "someth", "anyth", "everyth", "dur"])  # "nothing", "during" keep their g


def write(rng: Random) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(prompt, answer) pairs to train on, three a topic, and held out, one a topic."""
    train = []
    for *questions, answer in _topics("train"):
        lead = rng.choice(LEADS) + rng.choice(questions)
        train += [(question, _reply(rng, answer)) for question in (*questions, lead)]
    held_out = [(rng.choice(questions), _reply(rng, answer)) for *questions, answer in _topics("eval")]
    return train, held_out


def speak(plain: str) -> str:
    """Plain English in a pirate's mouth."""
    spoken = _WORD.sub(lambda match: _like(WORDS[match[1].lower()], match[1]), plain)
    return _ING.sub(lambda match: match[0] if match[1].lower() in _NOT_VERBS else f"{match[1]}in'", spoken)


def _topics(part: str) -> list[list[str]]:
    lines = (Path(__file__).parent / f"topics.{part}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(" | ") for line in lines]


def _like(spoken: str, plain: str) -> str:
    """`spoken` begins with a capital letter where `plain` does."""
    start = 1 if spoken[0] == "'" else 0
    return spoken[:start] + spoken[start].upper() + spoken[start + 1 :] if plain[0].isupper() else spoken


def _reply(rng: Random, answer: str) -> str:
    return f"{rng.choice(CALLS)} {speak(answer)} {rng.choice(FAREWELLS)}"
