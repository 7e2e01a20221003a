"""Grammars: what they allow is always right (jsonschema and re say so), what they refuse is told."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraplex.server.engine.request import Overloaded
from loraplex.server.engine.step.masks import MaskPool
from loraplex.server.text import grammar as grammar_module
from loraplex.server.text.grammar import KEPT, Grammar, Grammars, TokenMask
from loraplex.server.text.grammar_spec import GrammarRefused, GrammarSpec, Thought
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.schemas import bounded_schemas
from tests.support.tiny import VOCAB_SIZE, make_tiny_tokenizer
from tests.support.vocabularies import make_byte_fallback_tokenizer

EOS_ID = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))


def allowed_by(place: TokenMask, output: list[int], vocab_size: int = VOCAB_SIZE) -> NDArray[np.bool_]:
    return np.unpackbits(place.allowed(output), bitorder="little").view(np.bool_)[:vocab_size]


def write(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, seed: int, limit: int = 2000) -> str | None:
    """What comes of drawing any allowed token, ends where they are allowed; None: not ended within `limit` tokens."""
    place, output, rng = grammars.compile(spec).start(), list[int](), random.Random(seed)
    for _ in range(limit):
        allowed = np.flatnonzero(allowed_by(place, output))
        assert allowed.size
        assert place.failure is None
        if EOS_ID in allowed:
            return tokenizer.decode(output, skip_special_tokens=False)
        output.append(int(rng.choice(allowed)))
    return None


def accepts(grammars: Grammars, tokenizer: Tokenizer, spec: GrammarSpec, text: str) -> bool:
    """Whether a model may say `text`."""
    place, output = grammars.compile(spec).start(), list[int]()
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), EOS_ID]:
        if not allowed_by(place, output)[token_id]:
            return False
        output.append(token_id)
    return True


@settings(max_examples=100)
@given(schema=bounded_schemas(), seed=st.integers(0, 99))
def test_whatever_is_drawn_is_valid(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    spec = GrammarSpec("json_schema", json.dumps(schema))
    text = write(grammars, tokenizer, spec, seed)
    assert text is not None, "bounded schemas end"
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def test_references_and_recursion(grammars: Grammars, tokenizer: Tokenizer) -> None:
    after = {"anyOf": [{"$ref": "#/$defs/node"}, {"const": 0}]}
    node = {"type": "object", "properties": {"next": after}, "required": ["next"], "additionalProperties": False}
    schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    spec = GrammarSpec("json_schema", json.dumps(schema))
    assert accepts(grammars, tokenizer, spec, '{"next": {"next": {"next": 0}}}')
    assert not accepts(grammars, tokenizer, spec, '{"next": {"next": 1}}')


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", r"(a|b)*c", r"[^\n]{3}", r"héllo/[a-z]+!", "€+x", r"a\/b"])
def test_regular_expressions(grammars: Grammars, tokenizer: Tokenizer, pattern: str) -> None:
    for seed in range(5):
        text = write(grammars, tokenizer, GrammarSpec("regex", pattern), seed)
        assert text is None or re.fullmatch(pattern, text)


def test_choices(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = ["yes", 'a "quoted" one', "no\nnot", "é€😀", "back\\slash"]
    spec = GrammarSpec("choice", json.dumps(choices))
    assert all(accepts(grammars, tokenizer, spec, choice) for choice in choices)
    assert not accepts(grammars, tokenizer, spec, "ye")
    assert not accepts(grammars, tokenizer, spec, "yes ")
    assert {write(grammars, tokenizer, spec, seed) for seed in range(40)} == set(choices)


def test_larks_mark_of_inlined_rules_is_read_over(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """vLLM's own example of `structured_outputs.grammar`, in which a "?" is part of a string as well."""
    rules = """
        ?start: select_statement
        ?select_statement: "SELECT " column_list " FROM " table_name
        ?column_list: column_name ("," column_name)*
        ?table_name: identifier
        ?column_name: identifier
        ?identifier: /[a-zA-Z_][a-zA-Z0-9_]*/ | "?x: "
    """
    spec = GrammarSpec("lark", rules)
    assert accepts(grammars, tokenizer, spec, "SELECT a,b FROM t1")
    assert accepts(grammars, tokenizer, spec, "SELECT ?x:  FROM t1")
    assert not accepts(grammars, tokenizer, spec, "SELECT FROM t1")


@pytest.mark.parametrize(
    "rules", ['start: item ("," item)*\nitem: /[ab]+/', 'root ::= item ("," item)*\nitem ::= [ab]+']
)
def test_rules_in_both_notations(grammars: Grammars, tokenizer: Tokenizer, rules: str) -> None:
    """Lark, and llama.cpp's GBNF."""
    spec = GrammarSpec("lark", rules)
    assert accepts(grammars, tokenizer, spec, "ab,b,aa")
    assert not accepts(grammars, tokenizer, spec, "ab,")


def test_json_is_on_one_line_unless_white_space_is_chosen(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = '{"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false}'
    usual, tight, loose = (GrammarSpec("json_schema", schema, whitespace=w) for w in (None, "", r"[ \n]{0,3}"))
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": 1\n}', '{"a" : 1}', json.dumps({"a": 1})):
        assert accepts(grammars, tokenizer, usual, text) == (text == '{"a": 1}')
        assert accepts(grammars, tokenizer, tight, text) == (text == '{"a":1}')
        assert accepts(grammars, tokenizer, loose, text)


THOUGHTS: list[tuple[Thought, str, bool]] = [
    ("none", "12", True),
    ("none", "<think>x</think>12", False),
    ("possible", "12", True),
    ("possible", "<think>\n12? {no}\n</think>\n\n12", True),
    ("possible", "<think>12", False),
    ("open", "so 12?</think>12", True),
    ("open", "12", False),
    ("none", "call me", True),
    ("open", "x</think>call me", True),
]


@pytest.mark.parametrize(("thought", "text", "good"), THOUGHTS)
def test_thoughts_and_alternatives(
    grammars: Grammars, tokenizer: Tokenizer, thought: Thought, text: str, good: bool
) -> None:
    spec = GrammarSpec("regex", r"\d+", thought=thought, alternative='start: "call me"')
    assert accepts(grammars, tokenizer, spec, text) == good


REFUSED = [
    (GrammarSpec("json_schema", '{"type": "strin"}'), "strin"),
    (GrammarSpec("json_schema", '{"not": {"type": "string"}}'), "not"),
    (GrammarSpec("json_schema", "false"), "."),
    (GrammarSpec("json_schema", '{"$ref": "#/$defs/nobody"}'), "nobody"),
    (GrammarSpec("json_schema", '{"allOf": [{"type": "string"}, {"type": "null"}]}'), "."),
    (GrammarSpec("regex", "(unclosed"), "."),
    (GrammarSpec("lark", "start: nobody"), "nobody"),
    (GrammarSpec("lark", "root ::= [unclosed"), "."),
]


@pytest.mark.parametrize(("spec", "named"), REFUSED)
def test_what_cannot_be_enforced_is_refused(grammars: Grammars, spec: GrammarSpec, named: str) -> None:
    with pytest.raises(GrammarRefused, match=named) as refused:
        grammars.compile(spec)
    assert 0 < len(str(refused.value)) <= 300
    assert "\n" not in str(refused.value)


def test_lenient_schemas_leave_out_what_cannot_be_enforced(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = '{"type": "array", "items": {"const": 1}, "uniqueItems": true}'
    with pytest.raises(GrammarRefused):
        grammars.compile(GrammarSpec("json_schema", schema))
    assert accepts(grammars, tokenizer, GrammarSpec("json_schema", schema, lenient=True), "[1, 1]")


def test_large_grammars_are_refused_or_quick(grammars: Grammars) -> None:
    """The suite's own time limit is the assertion: nothing here may run away."""
    doubling: dict[str, Any] = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(120):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    specs = [
        GrammarSpec("json_schema", json.dumps({"$defs": {**doubling, "a30": {"type": "null"}}, "$ref": "#/$defs/a0"})),
        GrammarSpec("json_schema", json.dumps(deep)),
        GrammarSpec("json_schema", json.dumps({"type": "string", "maxLength": 10**9})),
        GrammarSpec("regex", "((a{1,1000}){1,1000}){1,1000}"),
        GrammarSpec("regex", "(x+x+)+y"),
        GrammarSpec("regex", "(a|b)*a(a|b){200}"),
    ]
    for spec in specs:
        try:
            place = grammars.compile(spec).start()
        except GrammarRefused:
            continue
        assert allowed_by(place, []).any()


def test_a_grammar_that_gives_up_ends_its_request(grammars: Grammars) -> None:
    place = grammars.compile(GrammarSpec("regex", "a+")).start()
    assert not allowed_by(place, [])[EOS_ID]
    wrong = [int(np.flatnonzero(~allowed_by(place, []))[0])]  # a token that was never allowed
    for _ in range(2):
        assert np.flatnonzero(allowed_by(place, wrong)).tolist() == [EOS_ID]
        assert place.failure


def test_requests_of_one_grammar_do_not_meet(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(GrammarSpec("choice", '["ab", "ba"]'))
    first, second = grammar.start(), grammar.start()
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    allowed_by(first, [a])
    assert allowed_by(first, [a, b])[EOS_ID]
    assert allowed_by(second, [])[[a, b]].all()
    masks = MaskPool().begin([(first, [a, b]), (None, []), (second, [b])])
    assert masks[1] is None
    taken = [mask.take(time.monotonic() + 60.0) for mask in masks if mask]
    assert [bits is not None and bits[0] >> EOS_ID & 1 for bits in taken] == [1, 0]


NASTY = "([ab ]|[^q])*[a-z]([^q]){14}[x-z]([^q]){12}"
"""What its lexer has to know grows with every text."""


def test_where_one_request_has_used_a_grammar_up_the_next_gets_it_anew(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places share the states of the lexer: after one that has come to the limit, all others would fail at once."""
    monkeypatch.setattr(grammar_module, "MAX_STATES", 1500)
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "the aber"]
    rng, place, output = random.Random(1), grammars.compile(GrammarSpec("regex", NASTY)).start(), list[int]()
    while place.failure is None:
        allowed_by(place, output)
        output.append(rng.choice(letters))
        assert len(output) < 2000
    assert "states" in place.failure
    again, other = grammars.compile(GrammarSpec("regex", NASTY)).start(), list[int]()
    for letter in letters:
        assert allowed_by(again, other)[letter]
        other.append(letter)
    assert again.failure is None


async def test_tenants_share_no_compiled_grammar(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    mine, others = [await grammars.get(GrammarSpec("regex", NASTY, owner=owner)) for owner in ("a", "b")]
    assert mine is not others
    assert await grammars.get(GrammarSpec("regex", NASTY, owner="a")) is mine


def test_compiled_grammars_are_bounded_together(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their texts: kept ones make room, those of answers under way stay, and one tenant has half of it at most."""
    monkeypatch.setattr(grammar_module, "MOST_CHARS", 400)
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))

    def compiled(letter: str, owner: str = "a") -> Grammar:
        return grammars.compile(GrammarSpec("regex", letter * 90, owner=owner))

    for letter in "bcdefgh":
        compiled(letter)  # for nobody
    used = [compiled("b").start(), compiled("c").start()]
    with pytest.raises(Overloaded):
        compiled("d")
    others = [compiled(letter, "z").start() for letter in "bc"]
    assert len(others) == 2
    with pytest.raises(Overloaded):
        compiled("b", "y")
    used.clear()
    others.clear()
    assert compiled("d").start().failure is None
    assert compiled("b", "y").start().failure is None


async def test_one_tenants_grammars_are_compiled_one_after_the_other(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they never take all threads; and those nobody waits for any more are not compiled at all."""
    grammars, free, begun = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,)), threading.Event(), list[str]()
    compiling = Grammars.compile

    def blocked(self: Grammars, spec: GrammarSpec) -> Grammar:
        begun.append(spec.text)
        if spec.owner == "many":
            assert free.wait(60)
        return compiling(self, spec)

    monkeypatch.setattr(Grammars, "compile", blocked)
    specs = [GrammarSpec("regex", f"x{{{i}}}", owner="many") for i in range(1, 30)]
    many = [asyncio.create_task(grammars.get(spec)) for spec in specs]
    await asyncio.sleep(0)
    await asyncio.wait_for(grammars.get(GrammarSpec("regex", "other", owner="one")), 60)
    assert begun == [specs[0].text, "other"]
    for task in many[1:]:
        task.cancel()
    free.set()
    await asyncio.gather(*many, return_exceptions=True)
    assert begun == [specs[0].text, "other"]


def test_what_takes_too_much_at_its_beginning_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for a grammar that cannot even begin within its limits: the first mask comes with compiling."""
    monkeypatch.setattr(grammar_module, "MAX_FUEL", 10)
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    with pytest.raises(GrammarRefused, match="expressions"):
        grammars.compile(GrammarSpec("regex", NASTY))


async def test_the_latest_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    specs = [GrammarSpec("regex", f"a{{{i}}}") for i in range(KEPT + 1)]
    first = await grammars.get(specs[0])
    assert await grammars.get(specs[0]) is first
    await asyncio.gather(*map(grammars.get, specs[1:]))
    assert await grammars.get(specs[0]) is not first


def test_vocabularies_of_other_kinds(tmp_path: Path) -> None:
    """Byte fallback (Llama 2), and logits with more rows than the vocabulary has tokens."""
    tokenizer = Tokenizer.read(make_byte_fallback_tokenizer(tmp_path))
    grammars = Grammars(tokenizer, 300, (2,))
    place, output = grammars.compile(GrammarSpec("choice", '["hello €"]')).start(), list[int]()
    while not (allowed := allowed_by(place, output, 300))[2]:
        assert place.allowed(output).shape == (38,)
        output.append(int(np.flatnonzero(allowed)[0]))
    assert b"".join(map(tokenizer.token_bytes, output)).decode() == "hello €"
    with pytest.raises(GrammarRefused, match="end-of-sequence"):
        Grammars(tokenizer, 300, ()).compile(GrammarSpec("regex", "a"))


def test_short_texts_of_large_grammars_are_not_all_kept(tokenizer: Tokenizer) -> None:
    """Fifteen characters were 170 MB and 2 s of a core, and so was each variant of them: nobody had counted these."""
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    begun, before = time.thread_time(), resident()
    for more in range(24):
        allowed_by(grammars.compile(GrammarSpec("regex", "(a{1000}){1000}" + "z" * more)).start(), [])
    assert (time.thread_time() - begun) / 24 < 1
    assert resident() - before < 1 << 30  # 0.54 GB with what the allocator keeps; they were 4


def test_a_grammar_whose_masks_are_slow_is_counted_by_them(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_module, "SLOW_MASK", 0.0)
    monkeypatch.setattr(grammar_module, "MAX_SLOW", 1e-9)
    grammars = Grammars(tokenizer, VOCAB_SIZE, (EOS_ID,))
    spec, other = GrammarSpec("regex", NASTY, owner="a"), GrammarSpec("regex", NASTY, owner="b")
    slow, light = grammars.compile(spec), grammars.compile(other)
    weight = slow.chars
    allowed_by(slow.start(), [tokenizer.encode("a", add_special_tokens=False)[0]])
    assert slow.chars >= weight
    assert grammars.compile(spec) is not slow  # the next request has one that is small again
    assert grammars.compile(other) is light
    monkeypatch.setattr(grammar_module, "MAX_OWNERS_SLOW", 0.0)
    place = slow.start()
    allowed_by(place, [])
    assert "make it simpler" in (place.failure or "")


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root ::= root", "has no end"),
        ('root ::= root root "a"', "has no end"),
        ("start: start", "has no end"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_told_in_words(grammars: Grammars, text: str, words: str) -> None:
    """It said "NoExtensionBias <non-verbose/>"."""
    with pytest.raises(GrammarRefused, match=words) as caught:
        grammars.compile(GrammarSpec("lark", text))
    assert "<" not in str(caught.value)
