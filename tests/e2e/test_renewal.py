"""An answer that goes on under the next version of its adapter: what it says, who it says has said it, what is left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from loraplex.adapters.version import AdapterVersion
from tests.support.held_steps import Steps
from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.served import greedy
from tests.support.waiting import LIMIT, wait_for

LENGTH = 60
NAME = "policy"


@pytest.fixture(scope="module")
def live(base: Path) -> Iterator[LiveServer]:
    with live_server(base) as server:
        yield server


@pytest.fixture(scope="module")
def trained(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What two steps of a training wrote."""
    folder = tmp_path_factory.mktemp("steps")
    return [make_peft_adapter(oracle, folder / f"{seed}", seed=seed, r=4, target_modules=ALL) for seed in range(2)]


@dataclass
class Rollout:
    """A long answer as it comes, and what is done to its server meanwhile."""

    live: LiveServer
    steps: Steps
    trained: list[Any]

    def load(self, step: int, **fields: Any) -> AdapterVersion:
        body = {"load_inplace": True, **fields}
        answer = self.live.load(NAME, self.trained[step].folder, **body)
        assert answer.status_code == 200, answer.text
        version = self.live.parts.adapters.registry.get(NAME)
        assert version is not None
        return version

    def begin(self, path: str = "/v1/completions", model: str = NAME, steps: int = 4, **fields: Any) -> Iterator[Any]:
        """Its events, of which one has come: the engine is in one of its steps and waits."""
        self.settle()
        self.steps.hold(steps)
        body = {"model": model, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        if path == "/v1/completions":
            body.setdefault("prompt", "the")
        events = self._events(path, body)
        return chain([next(events)], events)

    def settle(self) -> None:
        """Have the receipt made, whose probe would take steps otherwise."""
        assert self.live.ask("GET", f"/v1/adapters/{NAME}?wait=30").json()["proof"]["receipt"]

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[Any]:
        with httpx.stream("POST", self.live.url + path, json=body, timeout=LIMIT) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def exchange(self, mode: str, step: int = 1) -> AdapterVersion:
        """Pause between two steps, replace the adapter, resume."""
        paused = self.live.parts.engine.pause(keep=True)
        self.steps.free()
        paused.result(LIMIT)
        version = self.load(step)
        answer = self.live.ask("POST", f"/resume{mode}")
        assert answer.status_code == 200, answer.text
        return version


@pytest.fixture
def rollout(live: LiveServer, trained: list[Any]) -> Iterator[Rollout]:
    found = Rollout(live, Steps(live), trained)
    found.load(0)
    yield found
    found.steps.free()
    live.parts.engine.resume()
    live.idle()


def mixed(old: Any, new: Any, prompt: list[int], first: int, tokens: int) -> list[int]:
    """What transformers says if `old` has written `first` tokens and `new` goes on with its keys and values."""
    ids = prompt + greedy(old, prompt, first)[0]
    with torch.no_grad():
        cache = old(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        while len(ids) < len(prompt) + tokens:
            out = new(torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(int(out.logits[0, -1].argmax()))
    return ids[len(prompt) :]


def recomputed(old: Any, new: Any, prompt: list[int], first: int, tokens: int) -> list[int]:
    """What it says if `new` reads the prompt and the `first` tokens of `old` as a prompt."""
    ids = greedy(old, prompt, first)[0]
    return ids + greedy(new, prompt + ids, tokens - first)[0]


@pytest.mark.parametrize(("mode", "cache", "says"), [("recompute", "recomputed", recomputed), ("keep", "kept", mixed)])
@pytest.mark.parametrize("ids", [True, False])
def test_the_new_version_goes_on(rollout: Rollout, mode: str, cache: str, says: Any, ids: bool) -> None:
    live, (old, new) = rollout.live, [adapter.model for adapter in rollout.trained]
    prompt = live.tokenizer.encode("the")
    before = live.parts.adapters.registry.get(NAME)
    assert before is not None
    events = rollout.begin(return_token_ids=ids)
    after = rollout.exchange(f"?mode={mode}")
    chunks = list(events)
    said = [chunk["choices"][0]["versions"] for chunk in chunks if "versions" in chunk["choices"][0]]
    assert said[0] == said[-1]  # with the chunk of the change, and with the last one
    assert len(said) == 2
    (first, second) = said[0]
    names = [f"{NAME}@{version.digest[:12]}" for version in (before, after) if version.digest]
    assert first == {"version": names[0], "from_token": 0, "cache": None}
    count = second["from_token"]
    assert second == {"version": names[1], "from_token": count, "cache": cache}
    assert 0 < count < LENGTH
    expected = says(old, new, prompt, count, LENGTH)
    others = {tuple(each(old, new, prompt, count, LENGTH)) for each in (recomputed, mixed)}
    assert len(others | {tuple(greedy(m, prompt, LENGTH)[0]) for m in (old, new)}) == 4  # they can be told apart
    if ids:
        assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == expected
    text = live.tokenizer.decode(expected)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    told = [chunk["system_fingerprint"] for chunk in chunks]
    changed = told.index(names[1])
    assert told == [names[0]] * changed + [names[1]] * (len(told) - changed)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_no_key_finds_what_two_versions_have_made(rollout: Rollout, mode: str) -> None:
    """Whoever asks on from the answer, under either version, is answered as by that version alone."""
    live, models = rollout.live, [adapter.model for adapter in rollout.trained]
    prompt = live.tokenizer.encode("the")
    events = rollout.begin(return_token_ids=True, steps=24)
    rollout.exchange(f"?mode={mode}")
    answer = [i for chunk in events for i in chunk["choices"][0]["token_ids"]]
    known = prompt + answer
    assert live.load("before", rollout.trained[0].folder).status_code == 200
    for name, model in ((NAME, models[1]), ("before", models[0])):
        found = live.complete(name, 20, prompt=known, return_token_ids=True).json()["choices"][0]["token_ids"]
        assert found == greedy(model, known, 20)[0]
    assert live.unload("before").status_code == 200


@pytest.mark.parametrize("mode", ["?mode=stay", ""])
def test_unless_asked_it_ends_as_it_began(rollout: Rollout, mode: str) -> None:
    events = rollout.begin()
    rollout.exchange(mode)
    chunks = list(events)
    expected = greedy(rollout.trained[0].model, rollout.live.tokenizer.encode("the"), LENGTH)[0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == rollout.live.tokenizer.decode(expected)
    assert not any("versions" in chunk["choices"][0] for chunk in chunks)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_what_was_asked_for_by_its_digest_stays(rollout: Rollout, mode: str) -> None:
    version = rollout.live.parts.adapters.registry.get(NAME)
    assert version is not None
    events = rollout.begin(model=f"{NAME}@{version.digest}")
    rollout.exchange(f"?mode={mode}")
    expected = greedy(rollout.trained[0].model, rollout.live.tokenizer.encode("the"), LENGTH)[0]
    assert "".join(chunk["choices"][0]["text"] for chunk in events) == rollout.live.tokenizer.decode(expected)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_nothing_of_the_old_version_is_left(rollout: Rollout, mode: str) -> None:
    """While the answer goes on: neither leases nor pages, nor a copy in host memory."""
    live = rollout.live
    old = live.parts.adapters.registry.get(NAME)
    assert old is not None
    assert old.digest is not None
    events = rollout.begin(max_tokens=400)  # long enough to be looked at
    engine = live.parts.engine
    paused = engine.pause(keep=True)
    rollout.steps.free()
    paused.result(LIMIT)
    rollout.load(1)
    rollout.steps.hold(2)
    assert live.parts.adapters.registry.leases(old) > 0
    assert live.ask("POST", f"/resume?mode={mode}").status_code == 200
    wait_for(lambda: old not in live.parts.adapters.registry.all())
    rollout.steps.allow(3)
    next(events)
    wait_for(lambda: engine.stats().running and old.digest not in engine.stats().adapters.resident)
    live.parts.engine._scheduler.check_integrity()
    rollout.steps.free()
    list(events)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_who_leaves_meanwhile_leaves_nothing(rollout: Rollout, mode: str) -> None:
    live = rollout.live
    events = rollout.begin(request_id="gone", rid="gone")
    paused = live.parts.engine.pause(keep=True)
    rollout.steps.free()
    paused.result(LIMIT)
    version = rollout.load(1)
    live.parts.engine.resume(None)
    live.parts.engine.pause(keep=True).result(LIMIT)
    assert live.ask("POST", f"/resume?mode={mode}").status_code == 200
    assert live.ask("POST", "/abort_request", json={"rid": "gone"}).status_code == 200
    list(events)
    live.idle()
    wait_for(lambda: live.parts.adapters.registry.leases(version) == 0)
    live.parts.engine._scheduler.check_integrity()


def test_an_answer_in_one_piece_says_so_too(rollout: Rollout) -> None:
    """Chat and SGLang's form of it; the header says who wrote last."""
    live = rollout.live
    chat = {"model": NAME, "messages": [{"role": "user", "content": "the"}], "max_tokens": LENGTH, "ignore_eos": True}
    sglang = {"text": "the", "lora_path": NAME, "sampling_params": {"max_new_tokens": LENGTH, "ignore_eos": True}}
    asked = [("/v1/chat/completions", chat), ("/generate", sglang)]
    rollout.settle()
    engine, drawn = live.parts.engine, live.parts.engine._scheduler.generation_tokens
    rollout.steps.hold(0)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(live.ask, "POST", path, json=body) for path, body in asked]
        wait_for(lambda: len(engine._requests._open) == 2)
        rollout.steps.allow(3)  # the first prompt; the second one; a token of each
        wait_for(lambda: engine._scheduler.generation_tokens >= drawn + 5)
        version = rollout.exchange("?mode=keep")
        whole, other = [answer.result(LIMIT) for answer in answers]
    assert version.digest is not None
    name = f"{NAME}@{version.digest[:12]}"
    assert whole.headers["x-loraplex-adapter"] == other.headers["x-loraplex-adapter"] == name
    assert whole.json()["system_fingerprint"] == name
    for spans in (whole.json()["choices"][0]["versions"], other.json()["meta_info"]["versions"]):
        assert [span["cache"] for span in spans] == [None, "kept"]
        assert spans[1]["version"] == name
        assert spans[1]["from_token"] > 0


def test_a_mode_nobody_knows(live: LiveServer) -> None:
    answer = live.ask("POST", "/resume?mode=hard")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mode")
