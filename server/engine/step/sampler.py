"""Pick tokens from logits: bias, penalties, temperature, truncation, the draw, and log-probabilities.

Every row is computed by itself, and its random number is a hash of (seed, position). So what a row draws never depends
on the rows beside it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.server.engine.policy.rows import Drawn, Row, SamplingState
from loraplex.server.engine.request import SamplingParams, TokenScores

WATERMARK_KEY = 15_485_863
"""Times the previous token: the seed of its green list. It is no secret: others can find and imitate the mark."""

WATERMARK_SHARE = 0.5
"""The green share of the vocabulary; gamma in the paper."""

WATERMARK_BIAS = 2.0
"""Added to the logits of green tokens; delta in the paper."""

_MASK = (1 << 64) - 1


MaskBits = NDArray[np.uint8]
"""The tokens that a grammar allows, as bits (see Constraint.allowed)."""


def sample(
    logits: Tensor, rows: Sequence[Row], masks: Sequence[MaskBits | None], ops: Backend, vocab: int | None = None
) -> list[Drawn]:
    """Draw one token per row. logits [N, columns] fp32, left as they are; len(rows) == len(masks) == N.

    vocab: of the base; None: all columns. Those behind are of adapters that have added tokens, and -inf for others.

    In order: what a grammar forbids, the watermark, logit_bias, repetition penalty (prompt and output), presence and
    frequency penalties (output), min_tokens, typical_p (at the temperature), temperature, top_k, top_p, min_p, draw.
    From temperature on, the backend's sample() computes. Greedy rows (temperature 0) take the largest logit after
    min_tokens; of equal ones the lowest id.
    """
    states = _states(rows)
    adjusted = _allowed(logits, masks)
    changed = [i for i, state in enumerate(states) if state.params.changes_logits(len(state.output))]
    if changed and adjusted is logits:
        adjusted = logits.clone()
    for i in changed:
        _adjust_(adjusted[i], states[i], masks[i] is not None, logits.shape[1] if vocab is None else vocab)
    params = [state.params for state in states]
    if all(wanted.temperature == 0.0 for wanted in params):
        ids = ops.argmax(adjusted)
    else:
        ids, _ = ops.sample(
            adjusted,
            [wanted.temperature for wanted in params],
            [wanted.top_k for wanted in params],
            [wanted.top_p for wanted in params],
            [wanted.min_p for wanted in params],
            [uniform(wanted.seed, row.known) for wanted, row in zip(params, rows, strict=True)],
        )
    return _scored(_numbers(adjusted, ids), logits, adjusted, params, ops)


def draws_ahead(rows: Sequence[Row], steps: int) -> Tensor | None:
    """Make the numbers by which several decode steps draw, DecodeSteps.draws; None where all rows are greedy.

    Nothing changes the logits of these rows, and nobody wants their log-probabilities.
    """
    params = [state.params for state in _states(rows)]
    if all(wanted.temperature == 0.0 for wanted in params):
        return None
    fixed = [(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p) for wanted in params]
    draws = array("d")
    for step in range(steps):
        for row, wanted, numbers in zip(rows, params, fixed, strict=True):
            draws.extend((*numbers, uniform(wanted.seed, row.known + step)))
    return torch.frombuffer(draws, dtype=torch.float64).view(steps, len(rows), -1)


def drawn_ahead(ids: Tensor, logits: Tensor) -> list[tuple[Drawn, ...]]:
    """List each row's tokens, step after step, of ids [steps, N] drawn; the last step's are from logits [N, vocab]."""
    *known, last = ids
    steps = [*(step.tolist() for step in known), _numbers(logits, last)]
    return [tuple(map(Drawn, tokens)) for tokens in zip(*steps, strict=True)]


def _states(rows: Sequence[Row]) -> list[SamplingState]:
    """Return the sampling states of `rows`, which draw and so have one each."""
    return [row.sampling for row in rows if row.sampling is not None]


def _numbers(logits: Tensor, ids: Tensor) -> list[int | None]:
    """List the ids [N] drawn from logits [N, vocab], with None for a row that computed no numbers.

    A draw takes NaN or infinity where there is one (see Backend), so one look a row is enough, and not 49,152.
    """
    taken = _values(logits, ids)
    return [token if logit < math.inf else None for token, logit in zip(ids.tolist(), taken, strict=True)]


def _values(logits: Tensor, ids: Tensor) -> list[float]:
    """Read row i at ids[i]. On the CPU one by one: gather takes 116 us there when a step has swept the caches."""
    if logits.device.type == "cpu":
        value = logits.numpy().item
        return [value(i, token) for i, token in enumerate(ids.tolist())]
    values: list[float] = logits.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    return values


def drawn_from(logits: Tensor, params: SamplingParams) -> Tensor:
    """Compute the logits [vocab] fp32 whose softmax a token is drawn from, of logits [vocab] after bias and penalties.

    Semantics: as Backend.sample: top_k, temperature, top_p, min_p, with -inf for what is left out; temperature 0: as
    given. Sorting for top_p takes 3.5 ms for 49,152 tokens.
    """
    if params.temperature == 0.0:
        return logits
    scaled = (logits - logits.max()) / max(params.temperature, 1e-6)
    if 0 < params.top_k < len(logits):
        scaled = scaled.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    if params.top_p < 1.0:
        ordered, order = scaled.sort(descending=True, stable=True)
        before = ordered.double().exp().cumsum(0)
        left_out = before.roll(1).index_fill(0, torch.zeros(1, dtype=torch.int64, device=logits.device), 0.0)
        scaled = scaled.index_fill(0, order[left_out >= params.top_p * before[-1]], -torch.inf)
    if params.min_p > 0.0:
        scaled = scaled.masked_fill(scaled < math.log(params.min_p), -torch.inf)
    return scaled


def score(logits: Tensor, ids: Sequence[int], k: int, ops: Backend) -> TokenScores:
    """Compute log-probabilities of given tokens. logits [N, vocab] fp32, left as they are; ids[i] is row i's."""
    wanted = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    norms = _log_norms(logits, ops)
    own = (logits[torch.arange(len(ids), device=logits.device), wanted] - norms).cpu().numpy()
    if k == 0:
        nothing = np.empty((len(ids), 0), np.float32)
        return TokenScores(own, nothing.astype(np.int32), nothing)
    values, tokens = logits.topk(min(k, logits.shape[1]), dim=1)
    top, top_ids = (values - norms.unsqueeze(1)).cpu().numpy(), tokens.int().cpu().numpy()
    order = np.lexsort((top_ids, -top))  # of equally likely ones the lowest id first
    return TokenScores(own, np.take_along_axis(top_ids, order, 1), np.take_along_axis(top, order, 1))


def _log_norms(logits: Tensor, ops: Backend) -> Tensor:
    """Compute log(sum(exp(row))) of each row of logits [N, vocab].

    On the CPU the kernels' own threads do it, with the likeliest tokens: 1 ms for 64 rows of 49,152, where logsumexp
    takes 3 to 30, and 110 where other processes want the cores.
    """
    if logits.device.type != "cpu":
        return logits.logsumexp(1)
    n = logits.shape[0]
    likeliest, logprobs = ops.sample(logits, [0.0] * n, [0] * n, [1.0] * n, [0.0] * n, [0.0] * n)
    return torch.tensor(_values(logits, likeliest)) - logprobs


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits: the same for the same (seed, position) on every platform."""
    return (_mix(_mix(seed) + position * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """Compute splitmix64's step: every bit of x reaches every bit of the result."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _adjust_(logits: Tensor, row: SamplingState, is_held: bool, base_vocab: int) -> None:
    """Apply watermark, bias, penalties, min_tokens and typical_p to logits [vocab]. Ids outside have no effect.

    is_held: a grammar has forbidden what min_tokens forbids. base_vocab: without the tokens that adapters have added,
    which are no part of a watermark: a row's draw must not depend on what others of its step wear.
    """
    params = row.params
    if params.watermark:
        _mark_(logits[:base_vocab], int((row.output or row.prompt)[-1]))
    vocab, device = logits.shape[0], logits.device
    if params.logit_bias:
        ids, values = params.biases
        inside = (ids >= 0) & (ids < vocab)
        logits.index_add_(0, torch.from_numpy(ids[inside]).to(device), torch.from_numpy(values[inside]).to(device))
    if params.repetition_penalty != 1.0:  # CTRL: towards less likely, whatever the sign
        given = np.asarray(row.prompt, np.int64)
        seen = torch.from_numpy(np.concatenate((given, np.array(row.output, np.int64)))).to(device)
        found = logits[seen]
        logits[seen] = torch.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and row.output:
        output, times = np.unique(np.array(row.output, np.int64), return_counts=True)
        counts = torch.from_numpy(times).to(device)
        logits[torch.from_numpy(output).to(device)] -= params.presence_penalty + params.frequency_penalty * counts
    if params.forbids_stopping(len(row.output)):
        stops = params.stops[(params.stops >= 0) & (params.stops < vocab)]
        without = logits.index_fill(0, torch.from_numpy(stops).to(device), -torch.inf)
        if not is_held or without.max() > -torch.inf:  # a finished grammar leaves nothing but to stop
            logits.copy_(without)
    if params.is_typical:
        _keep_typical_(logits, params)


def _mark_(logits: Tensor, previous: int) -> None:
    """Raise the logits [vocab] of the green half of the vocabulary, which the token before this one chooses.

    Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2, with the numbers of LoRAX and TGI. A
    detector that knows the numbers counts green tokens: about half of a text without the mark. The order is drawn on
    the CPU whatever the device, so that one detector is right for all servers. 0.2 ms a row for 49,152 tokens, 1 ms for
    151,936.
    """
    generator = torch.Generator().manual_seed(WATERMARK_KEY * previous)
    order = torch.randperm(logits.shape[0], generator=generator)
    green = order[: int(WATERMARK_SHARE * logits.shape[0])].to(logits.device)
    logits.index_add_(0, green, torch.full(green.shape, WATERMARK_BIAS, device=logits.device))


def _keep_typical_(logits: Tensor, params: SamplingParams) -> None:
    """Forbid all tokens but those whose surprise is nearest to the expected one, the nearest first, up to typical_p.

    Meister et al. 2022, "Locally Typical Sampling". logits [vocab].
    """
    logprobs = (logits / params.temperature).log_softmax(0)
    probs = logprobs.exp()
    entropy = -(logprobs * probs).nansum()
    distance = (logprobs + entropy).abs()
    if logits.device.type == "cpu":
        logits[distance > _distance_to(distance.numpy(), probs.numpy(), params.typical_p)] = -torch.inf
        return
    nearest, order = distance.sort()
    last = (probs[order].cumsum(0) < params.typical_p).sum().clamp(max=logits.shape[0] - 1)
    logits[distance > nearest[last]] = -torch.inf


def _distance_to(distance: NDArray[np.float32], probs: NDArray[np.float32], mass: float) -> float:
    """Find the distance up to which tokens, the nearest first, make up `mass`.

    Sorting 49,152 takes 3.5 ms a row. Floats that are not negative are in the order of their bits. So the upper half of
    the bits says near which distance it is, and only tokens that share that half are sorted: 0.1 ms.
    """
    coarse = distance.view(np.int32) >> 16
    sums = np.bincount(coarse, weights=probs).cumsum()
    at = int(np.searchsorted(sums, mass))
    if at == len(sums):  # rounding: the mass is all there is
        return math.inf
    places = np.flatnonzero(coarse == at)
    places = places[distance[places].argsort()]
    seen = probs[places].cumsum(dtype=np.float64) + (sums[at - 1] if at else 0.0)
    return float(distance[places[min(int(np.searchsorted(seen, mass)), len(places) - 1)]])


def _allowed(logits: Tensor, masks: Sequence[MaskBits | None]) -> Tensor:
    """Return the logits with those that a grammar forbids at -inf; the same tensor where there is no grammar.

    Eight tokens are looked up by a byte of the mask: 0.24 ms for 16 rows of 49,152.
    """
    held = [(i, mask) for i, mask in enumerate(masks) if mask is not None]
    if not held:
        return logits
    if logits.device.type == "cpu":
        return _allowed_here(logits, held)
    table = _penalties(logits.device)
    bits = torch.from_numpy(np.stack([_widened(mask, logits.shape[1]) for _, mask in held])).to(logits.device)
    added = torch.nn.functional.embedding(bits.int(), table).view(len(held), -1)[:, : logits.shape[1]]
    if len(held) == len(masks):
        return logits + added
    result = logits.clone()
    result[[i for i, _ in held]] += added
    return result


def _allowed_here(logits: Tensor, held: Sequence[tuple[int, MaskBits]]) -> Tensor:
    """Mask logits on the CPU in this thread alone: torch's own cost milliseconds to wake where cores are busy."""
    given, table = logits.numpy(), _penalties(logits.device).numpy()
    result = given.copy() if len(held) < len(given) else np.empty_like(given)
    for i, mask in held:
        mask = _widened(mask, given.shape[1])
        np.add(given[i], table.take(mask, axis=0).reshape(-1)[: given.shape[1]], out=result[i])
    return torch.from_numpy(result)


def _widened(mask: MaskBits, columns: int) -> MaskBits:
    """Return a mask of so many tokens, of which it forbids those that it does not know."""
    missing = -(-columns // 8) - len(mask)
    return mask[: -(-columns // 8)] if missing <= 0 else np.concatenate((mask, np.zeros(missing, np.uint8)))


@cache
def _penalties(device: torch.device) -> Tensor:
    """Make [256, 8] fp32: what the bits of a byte of a mask add to the logits of their tokens."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, 0.0, -np.inf).astype(np.float32)).to(device)


def _scored(
    tokens: Sequence[int | None], logits: Tensor, adjusted: Tensor, params: Sequence[SamplingParams], ops: Backend
) -> list[Drawn]:
    """Give each token the log-probabilities that its row wants, by the model's own logits [N, vocab] fp32.

    Rows that want processed ones have them by what is drawn from, which `adjusted` [N, vocab] becomes. A token is None
    where the row computed no numbers.
    """
    result = [Drawn(token) for token in tokens]
    asked: dict[tuple[int, bool], list[int]] = {}  # by how many likeliest ones, and of which logits
    for i, (token, wanted) in enumerate(zip(tokens, params, strict=True)):
        if wanted.logprobs is not None and token is not None:
            asked.setdefault((wanted.logprobs, wanted.processed), []).append(i)
    for (k, processed), places in asked.items():
        if processed:
            own = torch.stack([drawn_from(adjusted[i], params[i]) for i in places])
        else:
            own = logits if len(places) == len(tokens) else logits[places]
        drawn = [token for i in places if (token := tokens[i]) is not None]
        scores = score(own, drawn, k, ops)
        for place, i in enumerate(places):
            result[i] = Drawn(tokens[i], float(scores.logprobs[place]), scores.top(place))
    return result
