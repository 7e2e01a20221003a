"""The sampler against transformers' processors, OpenAI's formulas, torch.log_softmax and chi-square.

Where a distribution can be had exactly, it is: the random number is replaced by every point of a grid in turn, so the
share of points that pick a token is its probability to within one point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.select import load_backend
from loraplex.server.engine.policy.rows import Drawn, Row
from loraplex.server.engine.request import SamplingParams
from loraplex.server.engine.step import sampler
from loraplex.server.engine.step.sampler import uniform
from tests.support.drawing import drawing_row, with_params

VOCAB = 60
GRID = 2000
OPS: dict[str, Backend] = {name: load_backend(name, "cpu") for name in ("reference", "cpu")}
used = OPS["reference"]  # by sample(), in the test at hand


@pytest.fixture(autouse=True, params=OPS)
def _ops(request: pytest.FixtureRequest) -> None:
    global used
    used = OPS[request.param]


def sample(logits: Tensor, rows: Sequence[Row], ops: Backend | None = None) -> list[Drawn]:
    return sampler.sample(logits, rows, [None] * len(rows), ops or used)


def _logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _row(
    prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), position: int | None = None, **params: Any
) -> Row:
    position = len(prompt) + len(output) if position is None else position
    return drawing_row(SamplingParams(max_tokens=8, **params), position, prompt, output)


def _shares(monkeypatch: pytest.MonkeyPatch, logits: Tensor, row: Row) -> np.ndarray[Any, Any]:
    """The probability of every token, exact to a point of the grid. logits [vocab]."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, position: (seed + 0.5) / GRID)
    rows = [with_params(row, seed=i) for i in range(GRID)]
    tokens = [sampled.token_id for sampled in sample(logits.expand(GRID, -1), rows)]
    return np.bincount(tokens, minlength=logits.shape[0]) / GRID


def _expected(logits: Tensor, *processors: Any, ids: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
    """Softmax in fp64 of the logits after transformers' own processors."""
    scores = logits.unsqueeze(0).clone()
    for processor in processors:
        scores = processor(torch.tensor([ids], dtype=torch.int64), scores)
    return torch.softmax(scores[0].double(), -1).numpy()


def _assert_shares(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert np.abs(found - expected).max() <= 1.5 / GRID
    assert not found[expected == 0.0].any(), "a token outside the set was drawn"
    assert found[expected > 1.5 / GRID].all(), "a token of the set was never drawn"


TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": VOCAB},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 12, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.6},
    {"typical_p": 0.05},
    {"typical_p": 0.4},
    {"typical_p": 0.95},
    {"typical_p": 0.999999},
    {"temperature": 0.6, "typical_p": 0.5},
    {"temperature": 1.4, "typical_p": 0.7, "top_k": 12, "top_p": 0.8},
]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=str)
def test_the_distribution_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    from transformers.generation import logits_process as hf

    processors: list[Any] = [hf.TemperatureLogitsWarper(params.get("temperature", 1.0))]
    if "typical_p" in params:
        processors.append(hf.TypicalLogitsWarper(params["typical_p"]))
    if "top_k" in params:
        processors.append(hf.TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        processors.append(hf.TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        processors.append(hf.MinPLogitsWarper(params["min_p"]))
    logits = _logits(VOCAB, seed=3)
    _assert_shares(_shares(monkeypatch, logits, _row(**params)), _expected(logits, *processors))


def test_typical_p_leaves_out_the_likeliest_where_it_is_no_surprise() -> None:
    """Not a truncation from below like the others: half of the weight on one token, much less expected."""
    logits = torch.cat([torch.tensor([6.0]), torch.zeros(VOCAB * 9 - 1)])
    drawn = {sample(logits.unsqueeze(0), [_row(seed=i, typical_p=0.2)])[0].token_id for i in range(20)}
    assert 0 not in drawn
    assert sample(logits.unsqueeze(0), [_row(temperature=0.0, typical_p=0.2)])[0].token_id == 0, "greedy stays greedy"


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch, penalty: float) -> None:
    """Over prompt and output, positive and negative logits, repeated ids counted once."""
    from transformers.generation import logits_process as hf

    logits = _logits(VOCAB, seed=4)
    best = logits.argsort(descending=True).tolist()  # likely ones, so that a penalty left out shows
    prompt = (best[0], best[3], best[0], best[40])
    output = (best[1], best[3], best[50], best[1])
    assert logits[best[5]] > 0 > logits[best[40]]
    row = _row(prompt, output, repetition_penalty=penalty)
    expected = _expected(logits, hf.RepetitionPenaltyLogitsProcessor(penalty), ids=prompt + output)
    _assert_shares(_shares(monkeypatch, logits, row), expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.5), (1.1, -0.4)])
def test_presence_and_frequency_penalties_are_openais(
    monkeypatch: pytest.MonkeyPatch, presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the output and not the prompt."""
    logits = _logits(VOCAB, seed=5)
    prompt, output = (40, 41, 2), (7, 9, 7, 7, 40)
    counts = Counter(output)
    mu = [float(logit) - counts[j] * frequency - (counts[j] > 0) * presence for j, logit in enumerate(logits)]
    row = _row(prompt, output, presence_penalty=presence, frequency_penalty=frequency)
    _assert_shares(_shares(monkeypatch, logits, row), _expected(torch.tensor(mu)))


WATERMARKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.7},
    {"temperature": 1.4, "typical_p": 0.7},
]


@pytest.mark.parametrize("params", WATERMARKED, ids=str)
@pytest.mark.parametrize("output", [(), (5, 9)], ids=["after the prompt", "after an answer's token"])
def test_the_watermark_is_that_of_transformers(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], output: tuple[int, ...]
) -> None:
    """On the logits as the model gives them, before all else: as LoRAX and TGI have it, with their numbers."""
    from transformers.generation import logits_process as hf

    prompt = (7, 3, 11)
    logits = _logits(VOCAB + 1, seed=21)  # an odd number of tokens
    processors: list[Any] = [hf.WatermarkLogitsProcessor(VOCAB + 1, "cpu", greenlist_ratio=0.5, bias=2.0)]
    if "repetition_penalty" in params:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    processors.append(hf.TemperatureLogitsWarper(params.get("temperature", 1.0)))
    if "typical_p" in params:
        processors.append(hf.TypicalLogitsWarper(params["typical_p"]))
    if "top_k" in params:
        processors += [hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02)]
    expected = _expected(logits, *processors, ids=prompt + output)
    _assert_shares(_shares(monkeypatch, logits, _row(prompt, output, watermark=True, **params)), expected)
    greedy = _row(prompt, output, watermark=True, temperature=0.0)
    marked = processors[0](torch.tensor([prompt + output]), logits.unsqueeze(0))
    assert sample(logits.unsqueeze(0), [greedy])[0].token_id == int(marked.argmax())


def test_a_detector_tells_marked_text_from_other_text() -> None:
    """transformers' own; texts of 200 tokens in one batch, of which every other one is marked."""
    from transformers import PretrainedConfig
    from transformers.generation.watermarking import WatermarkDetector

    vocab = 500
    texts: list[tuple[int, ...]] = [()] * 6
    for position in range(200):
        logits = _logits(1, vocab, seed=position).expand(6, -1)
        kinds = [{"temperature": 0.0} if i < 2 else {"top_p": 0.95, "seed": i} for i in range(6)]
        rows = [_row((i,), text, watermark=i % 2 == 1, **kinds[i]) for i, text in enumerate(texts)]
        drawn = sample(logits, rows)
        assert drawn[1::2] == sample(logits[1::2], rows[1::2]), "whatever its neighbours"
        assert position + 1 == rows[0].known
        texts = [(*text, sampled.token_id or 0) for text, sampled in zip(texts, drawn, strict=True)]
    settings = {"greenlist_ratio": 0.5, "bias": 2.0, "hashing_key": 15485863, "seeding_scheme": "lefthash"}
    detector = WatermarkDetector(
        PretrainedConfig(vocab_size=vocab, bos_token_id=-1), "cpu", {**settings, "context_width": 1}
    )
    told = detector(torch.tensor(texts), z_threshold=4.0)
    assert told.tolist() == [False, True] * 3


def test_the_mark_is_a_function_of_the_token_before_alone() -> None:
    """Where a prompt ends and an answer begins does not matter: an answer may be computed again as a prompt."""
    logits = _logits(1, 4096, seed=22, scale=0.5)
    rows = [
        _row(prompt, output, watermark=True, seed=3, position=9)
        for prompt, output in (((1, 2, 3), ()), ((1, 2), (3,)), ((8,), (9, 3)), ((3,), ()))
    ]
    others = [_row((1, token), (), watermark=True, seed=3, position=9) for token in range(20)]
    assert len(set(sample(logits.expand(4, -1), rows))) == 1
    assert len(set(sample(logits.expand(20, -1), others))) > 1


def test_columns_of_another_rows_added_tokens_change_nothing() -> None:
    """A step's logits are as wide as the row that has most tokens; the others' further columns are -inf."""
    logits = _logits(1, VOCAB, seed=24)
    wide = torch.cat((logits, torch.full((1, 13), -torch.inf)), 1)
    for params in ({"watermark": True}, {"typical_p": 0.5}, {"top_p": 0.7, "min_p": 0.01}, {"temperature": 0.0}):
        rows = [_row(seed=seed, logprobs=3, **params) for seed in range(40)]
        nobody = [None] * len(rows)
        found = sampler.sample(wide.expand(40, -1), rows, nobody, used, VOCAB)
        plain = sampler.sample(logits.expand(40, -1), rows, nobody, used, VOCAB)
        assert [(drawn.token_id, [token for token, _ in drawn.top_logprobs]) for drawn in found] == [
            (drawn.token_id, [token for token, _ in drawn.top_logprobs]) for drawn in plain
        ]


@pytest.mark.parametrize("held", [[0], [0, 1]])
def test_a_grammar_forbids_added_tokens_that_it_does_not_know(held: list[int]) -> None:
    """Its mask ends with the base's vocabulary, or behind an added token that ends an answer."""
    logits = torch.zeros(2, VOCAB + 13)
    logits[:, VOCAB + 12], logits[:, VOCAB + 1], logits[:, 9] = 9.0, 8.0, 7.0
    rows = [_row(temperature=0.0) for _ in range(2)]
    for width, expected in ((VOCAB, 9), (VOCAB + 2, VOCAB + 1)):
        mask = np.packbits(np.ones(width, np.bool_), bitorder="little")
        found = sampler.sample(logits, rows, [mask if i in held else None for i in range(2)], used, VOCAB)
        assert [drawn.token_id for drawn in found] == [expected if i in held else VOCAB + 12 for i in range(2)]


def test_nobody_else_pays_for_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(3, VOCAB, seed=23)
    calls: list[int] = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: calls.append(n) or real(n, **how))
    sample(logits, [_row(), _row(temperature=0.0), _row(repetition_penalty=1.2)])
    assert calls == []
    sample(logits, [_row(), _row(temperature=0.0, watermark=True), _row(repetition_penalty=1.2)])
    assert calls == [VOCAB]


def test_everything_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias, repetition, presence and frequency, min_tokens, temperature, top_k, top_p: any other order differs."""
    from transformers.generation import logits_process as hf

    logits = _logits(VOCAB, seed=6)
    prompt, output = (1, 2, 3), (4, 5, 4)
    bias = {4: 3.0, 1: -2.0, 50: 5.0}
    counts = Counter(output)
    scores = logits.clone()
    for token, value in bias.items():
        scores[token] += value
    scores = hf.RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([prompt + output]), scores.unsqueeze(0))[0]
    for token, count in counts.items():
        scores[token] -= 0.3 * count + 0.2
    scores[[50, 11]] = -torch.inf
    expected = _expected(scores, hf.TemperatureLogitsWarper(0.8), hf.TopKLogitsWarper(25), hf.TopPLogitsWarper(0.9))
    row = _row(
        prompt,
        output,
        logit_bias=tuple(bias.items()),
        repetition_penalty=1.4,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        min_tokens=4,
        stop_token_ids=frozenset({50, 11}),
        temperature=0.8,
        top_k=25,
        top_p=0.9,
    )
    _assert_shares(_shares(monkeypatch, logits, row), expected)
    expected[[50, 11]] = -1.0
    assert sample(logits.unsqueeze(0), [with_params(row, temperature=0.0)]) == [Drawn(int(scores.argmax()))]


def _chi_square_limit(freedom: int) -> float:
    """Passed by chance once in 30,000 (Wilson and Hilferty's approximation at four standard deviations)."""
    return freedom * (1 - 2 / (9 * freedom) + 4 * sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_softmax(over: str) -> None:
    logits = _logits(30, seed=7, scale=1.0)
    draws = 20_000
    rows = [_row(seed=i, position=9) if over == "seeds" else _row(seed=1, position=i) for i in range(draws)]
    found = np.bincount([s.token_id for s in sample(logits.expand(draws, -1), rows)], minlength=30)
    expected = torch.softmax(logits.double(), -1).numpy() * draws
    assert expected.min() > 5
    assert ((found - expected) ** 2 / expected).sum() < _chi_square_limit(29)


@pytest.mark.parametrize("neighbour", ["next position", "next seed", "seed and position swapped"])
def test_random_numbers_of_neighbours_are_independent(neighbour: str) -> None:
    """Pairs fill the unit square evenly: 8 x 8 fields, 20,000 pairs."""
    pairs = []
    for i in range(20_000):
        seed, position = i // 100, i % 100 + 1000 * (i // 100)
        other = {
            "next position": (seed, position + 1),
            "next seed": (seed + 1, position),
            "seed and position swapped": (position + 10**6, seed),
        }[neighbour]
        pairs.append((int(uniform(seed, position) * 8), int(uniform(*other) * 8)))
    counts = np.bincount([8 * a + b for a, b in pairs], minlength=64)
    expected = len(pairs) / 64
    assert ((counts - expected) ** 2 / expected).sum() < _chi_square_limit(63)


def test_random_numbers_are_splitmix64_and_never_one() -> None:
    """The generator's published outputs for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = 1234567
    for output in published:
        assert sampler._mix(state) == output
        state += 0x9E3779B97F4A7C15
    for seed in (0, 1, 2**64 - 1, 2**63, -1):
        assert 0.0 <= uniform(seed, 2**31) < 1.0
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)  # 64 bits


def test_the_last_random_number_still_picks_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """u just below 1 and u = 0 stay within the tokens that have any probability."""
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 10:40] = _logits(30)
    for u, token in ((0.0, 10), (1.0 - 2.0**-53, 39)):
        monkeypatch.setattr(sampler, "uniform", lambda seed, position, u=u: u)
        assert sample(logits, [_row()])[0].token_id == token
        assert 10 <= sample(logits, [_row(top_p=0.99)])[0].token_id < 40
        assert 10 <= sample(logits, [_row(top_k=5)])[0].token_id < 40


_KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.0, "logprobs": 3},
    {"top_p": 0.9},
    {"top_k": 40, "top_p": 0.8},
    {"min_p": 0.1, "temperature": 1.3},
    {"repetition_penalty": 1.2, "temperature": 0.0},
    {"frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": 0},
    {"logit_bias": ((5, 4.0), (900, -3.0)), "logprobs": 5},
    {"min_tokens": 9, "stop_token_ids": frozenset({1, 2, 3}), "temperature": 0.0},
    {"watermark": True, "temperature": 0.0, "logprobs": 2},
    {"watermark": True, "top_p": 0.9},
]


def test_backends_draw_the_same_tokens() -> None:
    logits = _logits(300, 4099, seed=15)
    rows = [_row((1, 2, 3), (4, 5), seed=i, **_KINDS[i % len(_KINDS)]) for i in range(len(logits))]
    drawn, expected = sample(logits, rows), sample(logits, rows, OPS["reference"])
    assert [each.token_id for each in drawn] == [each.token_id for each in expected]
    tops = [[token for token, _ in each.top_logprobs] for each in drawn]
    assert tops == [[token for token, _ in each.top_logprobs] for each in expected]
    scored = [(one.logprob, other.logprob) for one, other in zip(drawn, expected, strict=True) if one.logprob]
    assert [found for found, _ in scored] == pytest.approx([wanted for _, wanted in scored], abs=1e-5)
    greedy = [_row(temperature=0.0)] * len(logits)
    assert [sampled.token_id for sampled in sample(logits, greedy)] == logits.argmax(-1).tolist()


def test_a_row_is_the_same_alone_and_among_others() -> None:
    logits = _logits(40, 4099, seed=8)
    rows = [
        _row(tuple(range(i + 1)), tuple(range(i % 5)), seed=i, **_KINDS[i % len(_KINDS)]) for i in range(len(logits))
    ]
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_the_draw_is_a_function_of_seed_and_position() -> None:
    logits = _logits(1, 4096, seed=9, scale=0.1).expand(200, -1)
    same = sample(logits, [_row((1,) * i, seed=5, position=77) for i in range(200)])
    assert len(set(same)) == 1
    assert len(set(sample(logits, [_row(seed=5, position=i) for i in range(200)]))) > 150
    assert len(set(sample(logits, [_row(seed=i, position=77) for i in range(200)]))) > 150


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"logit_bias": ((0, -1.0),)}], ids=str)
def test_greedy_takes_the_lowest_id_of_equal_logits(extra: dict[str, Any]) -> None:
    logits = torch.zeros(3, 49_152)
    logits[0, [40_000, 17, 30_000]] = 1.0
    logits[1, [49_151, 49_150]] = 1.0
    logits[2, 1:] = 0.5
    rows = [_row(temperature=0.0, **extra)] * 3
    assert [sampled.token_id for sampled in sample(logits, rows)] == [17, 49_150, 1]


@pytest.mark.parametrize("temperature", [1e-7, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = _logits(20, 500, seed=10, scale=30.0)
    rows = [_row(seed=i, temperature=temperature, top_p=0.5 + 0.5 * (i % 2)) for i in range(20)]
    assert [sampled.token_id for sampled in sample(logits, rows)] == logits.argmax(-1).tolist()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = _logits(6, 3000, seed=11)
    changes: dict[str, Any] = {"temperature": 0.6, "top_k": 4, "repetition_penalty": 2.0, "logit_bias": ((7, 50.0),)}
    rows = [_row(seed=i, logprobs=k, **changes) for i, k in enumerate((0, 1, 2, 5, 20, 3000))]
    expected = torch.log_softmax(logits, -1)
    for i, sampled in enumerate(sample(logits, rows)):
        assert sampled.token_id == 7
        assert sampled.logprob == pytest.approx(float(expected[i, 7]), abs=1e-5)
        k = rows[i].sampling.params.logprobs
        assert k is not None
        values, ids = expected[i].topk(k)
        assert [token for token, _ in sampled.top_logprobs] == ids.tolist()
        assert [value for _, value in sampled.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)
    assert sample(logits[:1], [_row(temperature=0.0)])[0].logprob is None


def test_more_logprobs_than_tokens() -> None:
    sampled = sample(_logits(1, 5), [_row(logprobs=20)])[0]
    assert sorted(token for token, _ in sampled.top_logprobs) == list(range(5))


def test_stop_tokens_are_forbidden_before_min_tokens() -> None:
    logits = torch.zeros(1, 8)
    logits[0, [2, 5]] = 20.0
    stop = frozenset({2, 5, 10**6})
    for output, allowed in (((), False), ((0, 0), False), ((0, 0, 0), True)):
        for temperature in (0.0, 1.0):
            row = _row((1,), output, min_tokens=3, stop_token_ids=stop, temperature=temperature, seed=3)
            assert (sample(logits, [row])[0].token_id in stop) == allowed


def test_logit_bias_forces_and_forbids() -> None:
    logits = _logits(1, 100, seed=12).expand(50, -1)
    best = int(logits[0].argmax())
    forced = [_row(seed=i, logit_bias=((33, 100.0),)) for i in range(50)]
    assert {sampled.token_id for sampled in sample(logits, forced)} == {33}
    forbidden = [_row(seed=i, logit_bias=((best, -100.0), (5000, 100.0), (-1, 100.0))) for i in range(50)]
    drawn = {sampled.token_id for sampled in sample(logits, forbidden)}
    assert best not in drawn
    assert len(drawn) > 5  # ids outside the vocabulary change nothing


def test_logits_are_left_as_they_are() -> None:
    logits = _logits(len(_KINDS), 1000, seed=13)
    before = logits.clone()
    sample(logits, [_row((1, 2, 3), (4, 4), seed=i, **kind) for i, kind in enumerate(_KINDS)])
    assert torch.equal(logits, before)


def test_rows_without_anything_to_draw_from_harm_nobody() -> None:
    """NaN, an infinite logit: no token; all forbidden: one of the vocabulary; and the neighbours' as ever."""
    logits = _logits(5, 50, seed=14)
    alone = sample(logits[4:], [_row(seed=4)])
    logits[0, 3] = torch.nan
    logits[1] = -torch.nan
    logits[2] = -torch.inf
    logits[3, 7] = torch.inf
    for kind in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.5}, {"temperature": 0.0}, {"logprobs": 2}):
        sampled = sample(logits, [*(_row(seed=i, **kind) for i in range(4)), _row(seed=4)])
        assert [sampled[i].token_id for i in (0, 1, 3)] == [None] * 3
        assert sampled[2].token_id in range(50)
        assert sampled[4] == alone[0]


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "kind",
    [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 3, "top_p": 0.9, "min_p": 0.01}, {"logprobs": 2}],
    ids=str,
)
def test_no_token_is_made_up_where_there_are_no_numbers(bad: float, kind: dict[str, Any]) -> None:
    """Wherever in a row it stands; the rows beside it draw what they draw without it."""
    logits = _logits(5, 49_157, seed=12)
    rows = [_row(seed=i, **kind) for i in range(5)]
    sound = sample(logits, rows)
    for i, at in ((1, 0), (2, 49_156), (4, 20_000)):
        logits[i, at] = bad
    drawn = sample(logits, rows)
    assert [drawn[i].token_id for i in (1, 2, 4)] == [None] * 3
    assert [drawn[i] for i in (0, 3)] == [sound[0], sound[3]]


def test_minus_infinity_is_a_number() -> None:
    """It is how tokens are forbidden: also by the model."""
    logits = torch.full((1, 500), -torch.inf)
    logits[0, 7] = -1e30
    assert sample(logits, [_row()])[0].token_id == 7
