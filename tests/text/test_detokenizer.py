"""Streaming text against decoding everything at once: nothing lost, nothing split, stop strings never shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.text.detokenizer import MAX_UNFINISHED, Detokenizer
from loraplex.server.text.tokenizer import Tokenizer
from tests.support.tiny import VOCAB_SIZE, make_tiny_tokenizer
from tests.support.vocabularies import make_byte_fallback_tokenizer

FIXTURE = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PIECES = st.sampled_from(["the ", "end", "é", "€", "😀", "👩‍👩‍👧", "\n", "�", "<|im_end|>", "e", "en", " ", "日本"])


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(make_tiny_tokenizer(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.read(make_byte_fallback_tokenizer(tmp_path_factory.mktemp("byte_fallback")))


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    """The texts of each token and of the end; nothing is pushed after a stop string."""
    texts = []
    for token_id in ids:
        texts.append(detokenizer.push(token_id))
        if detokenizer.stopped_by is not None:
            break
    return [*texts, detokenizer.finish()]


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=MAX_UNFINISHED - 1), skip=st.booleans())
@FIXTURE
def test_any_tokens_join_to_their_decoding(byte_level: Tokenizer, ids: list[int], skip: bool) -> None:
    """Random bytes included: half characters, stray continuation bytes, special tokens."""
    texts = stream(Detokenizer(byte_level, skip_special_tokens=skip), ids)
    assert "".join(texts) == byte_level.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40))
@FIXTURE
def test_lone_texts_are_what_tokens_add(byte_level: Tokenizer, ids: list[int]) -> None:
    """Tokens that are whole characters are not decoded again with those before them."""
    lone = [token_id for token_id in ids if byte_level.lone_text(token_id) is not None]
    assert "".join(byte_level.lone_text(token_id) or "" for token_id in lone) == byte_level.decode(lone)
    for token_id in set(ids) - set(lone):  # parts of characters, and special tokens
        assert byte_level.is_special(token_id) or "\ufffd" in byte_level.token_text(token_id)


def test_no_lone_texts_where_neighbours_matter(byte_fallback: Tokenizer) -> None:
    assert all(byte_fallback.lone_text(token_id) is None for token_id in range(300))


@given(text=st.text(max_size=40), chunk=st.integers(1, 5))
@FIXTURE
def test_characters_are_never_split(byte_level: Tokenizer, text: str, chunk: int) -> None:
    """Valid text never shows a replacement character on the way, however its tokens are cut."""
    ids = byte_level.encode(text, add_special_tokens=False)
    texts = stream(Detokenizer(byte_level), ids)
    assert "".join(texts) == text
    assert sum(t.count("\ufffd") for t in texts) == text.count("\ufffd")


@given(pieces=st.lists(PIECES, max_size=12))
@FIXTURE
def test_sentencepiece_style_decoders(byte_fallback: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces).replace("\ufffd", "")
    ids = byte_fallback.encode("h" + text, add_special_tokens=False)
    assert "".join(stream(Detokenizer(byte_fallback), ids)) == "h" + text


@given(ids=st.lists(st.integers(0, 270), max_size=MAX_UNFINISHED - 1))
@FIXTURE
def test_byte_runs_that_are_no_text_lose_nothing_valid(byte_fallback: Tokenizer, ids: list[int]) -> None:
    """Such decoders change their mind about earlier bytes of a run; streams cannot, but must not fail or go silent."""
    texts = stream(Detokenizer(byte_fallback), ids)
    ascii_only = [t for t in "".join(texts) if t.isascii()]
    assert len(ascii_only) >= len([t for t in byte_fallback.decode(ids) if t.isascii()]) - 1  # the stripped first space


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_words_keep_their_space_after_a_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("hello hello", add_special_tokens=False)
    half = next(i for i in range(1, len(ids)) if tokenizer.decode(ids[:i]) == "hello")
    assert "".join(stream(Detokenizer(tokenizer, ids[:half]), ids[half:])) == " hello"


def test_a_prompt_that_ends_inside_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a😀", add_special_tokens=False)
    assert "".join(stream(Detokenizer(byte_level, ids[:-1]), [*ids[-1:], *byte_level.encode("b", False)])) == "\ufffdb"


def test_garbage_is_shown_in_bounded_time(byte_level: Tokenizer) -> None:
    """A model stuck on one continuation byte must not make each token dearer than the one before."""
    stray = byte_level.encode("😀", add_special_tokens=False)[-1]
    asked: list[int] = []

    class Counting:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            asked.append(len(ids))
            return byte_level.decode(ids, skip_special_tokens)

        def lone_text(self, token_id: int) -> str | None:
            return byte_level.lone_text(token_id)

    texts = stream(Detokenizer(Counting()), [stray] * 1000)
    assert "".join(texts) == "\ufffd" * 1000
    assert max(asked) <= 2 * MAX_UNFINISHED


# ------------------------------------------------------------------------------------------------------ stop strings


def cut_at_first_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The rule, character by character: read on until the text ends with a stop string."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    pieces=st.lists(PIECES, max_size=12),
    stops=st.lists(
        st.sampled_from(["end", "the end", "e", "nd the", "😀", "\n\n", "é€", "<|im_end|>", "日"]), max_size=3
    ),
    include=st.booleans(),
    data=st.data(),
)
@FIXTURE
def test_stop_strings(
    byte_level: Tokenizer, pieces: list[str], stops: list[str], include: bool, data: st.DataObject
) -> None:
    """Whatever the token borders, the answer is the text up to the stop string that is complete first."""
    text = "".join(pieces)
    ids = data.draw(splits_of(text, byte_level))
    detokenizer = Detokenizer(byte_level, stop=stops, include_stop=include, skip_special_tokens=False)
    shown = ""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert detokenizer.released == len(shown)
        if detokenizer.stopped_by is not None:
            break
        held = text[detokenizer.released : detokenizer.decoded]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)  # no more than needed
        assert cut_at_first_stop(shown, stops, include)[1] is None
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped_by) == cut_at_first_stop(text, stops, include)


@given(
    words=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
@settings(max_examples=300)
def test_stop_strings_inside_one_token(words: list[str], stops: list[str], include: bool) -> None:
    """Long tokens that hold several stop strings, or overlapping ones, are cut as if they came letter by letter."""

    class Words:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            return "".join(words[i] for i in ids)

        def lone_text(self, token_id: int) -> str | None:
            return None

    detokenizer = Detokenizer(Words(), stop=stops, include_stop=include)
    shown = "".join(stream(detokenizer, range(len(words))))
    assert (shown, detokenizer.stopped_by) == cut_at_first_stop("".join(words), stops, include)


def splits_of(text: str, tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Token lists that decode to `text`, with borders in other places than the encoder puts them."""

    @st.composite
    def draw_ids(draw: Callable[..., int]) -> list[int]:
        ids: list[int] = []
        rest = text
        while rest:
            size = draw(st.integers(1, len(rest)))
            ids += tokenizer.encode(rest[:size], add_special_tokens=False)
            rest = rest[size:]
        return ids

    return draw_ids()


def test_the_beginning_of_a_stop_string_is_held_and_given_out(byte_level: Tokenizer) -> None:
    letters = [byte_level.encode(c, add_special_tokens=False)[0] for c in "xSTAY"]
    detokenizer = Detokenizer(byte_level, stop=["STOP"])
    assert [detokenizer.push(i) for i in letters] == ["x", "", "", "STA", "Y"]
    assert detokenizer.finish() == ""
    detokenizer = Detokenizer(byte_level, stop=["STOP"])
    assert [detokenizer.push(i) for i in letters[:3]] == ["x", "", ""]
    assert (detokenizer.decoded, detokenizer.released) == (3, 1)
    assert detokenizer.finish() == "ST"


def test_stop_strings_wait_for_min_tokens(byte_level: Tokenizer) -> None:
    letters = [byte_level.encode(c, add_special_tokens=False)[0] for c in "aXbXc"]
    detokenizer = Detokenizer(byte_level, stop=["X"], min_tokens=2)
    assert "".join(stream(detokenizer, letters)) == "aXb"
    assert detokenizer.stopped_by == "X"


def test_a_stop_string_completed_by_the_last_half_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a", add_special_tokens=False) + byte_level.encode("😀", add_special_tokens=False)[:2]
    detokenizer = Detokenizer(byte_level, stop=["\ufffd"])
    assert "".join(stream(detokenizer, ids)) == "a"
    assert detokenizer.stopped_by == "\ufffd"
