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
import openai
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


def named(live: LiveServer) -> str:
    """Who answers, as answers say it."""
    version = live.parts.adapters.registry.get(NAME)
    assert version is not None
    assert version.digest is not None
    return f"{NAME}@{version.digest[:12]}"


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


def begun(rollout: Rollout, count: int = 1) -> None:
    """Let `count` answers, asked for by now, have their prompts read and a token or two, and no more."""
    engine = rollout.live.parts.engine
    wait_for(lambda: len(engine._requests._open) == count)
    drawn = engine._scheduler.generation_tokens
    rollout.steps.allow(count + 1)
    wait_for(lambda: engine._scheduler.generation_tokens >= drawn + count)


def check_spans(spans: list[dict[str, Any]], before: str, after: str) -> int:
    """That `before` wrote the first tokens and `after` the others; from which one on."""
    count: int = spans[1]["from_token"]
    assert spans == [
        {"version": before, "from_token": 0, "cache": None},
        {"version": after, "from_token": count, "cache": "kept"},
    ]
    assert 0 < count < LENGTH
    return count


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_lorax_says_so_in_its_details(rollout: Rollout, path: str) -> None:
    live, (old, new) = rollout.live, [adapter.model for adapter in rollout.trained]
    parameters = {"adapter_id": NAME, "max_new_tokens": LENGTH, "ignore_eos_token": True, "details": True}
    before = named(live)
    rollout.settle()
    rollout.steps.hold(0)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(live.ask, "POST", path, json={"inputs": "the", "parameters": parameters})
        begun(rollout)
        rollout.exchange("?mode=keep")
        answer = coming.result(LIMIT)
    if path == "/generate":
        details = answer.json()["details"]
        tokens = details["tokens"]
    else:
        lines = [line for line in answer.text.splitlines() if line.startswith("data:")]
        events = [json.loads(line.removeprefix("data:")) for line in lines]
        tokens, details = [event["token"] for event in events], events[-1]["details"]
    count = check_spans(details["versions"], before, named(live))
    prompt = live.tokenizer.encode("the")
    assert [token["id"] for token in tokens] == mixed(old, new, prompt, count, LENGTH)


@pytest.mark.parametrize("way", ["whole", "stream", "background"])
def test_responses_say_so_to_the_official_client(rollout: Rollout, way: str) -> None:
    live, before = rollout.live, named(rollout.live)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
    fields: Any = {"model": NAME, "input": "the", "max_output_tokens": LENGTH, "extra_body": {"ignore_eos": True}}
    rollout.settle()
    rollout.steps.hold(0)

    def ask() -> tuple[Any, list[Any]]:
        if way == "stream":
            with client.responses.stream(**fields) as stream:
                events = [event.to_dict() for event in stream]  # as they are when they come
                return events[-1]["response"], events
        return client.responses.create(**fields, background=way == "background").to_dict(), []

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(ask)
        begun(rollout)
        if way == "background":
            shown = client.responses.retrieve(coming.result(LIMIT)[0]["id"]).to_dict()
            assert (shown["status"], shown["system_fingerprint"]) == ("in_progress", before)
            assert "versions" not in shown
        rollout.exchange("?mode=keep")
        answer, events = coming.result(LIMIT)
    if way == "background":
        live.idle()
        answer = client.responses.retrieve(answer["id"]).to_dict()
    assert answer["status"] == "incomplete"  # by its length
    assert answer["system_fingerprint"] == named(live)
    check_spans(answer["versions"], before, named(live))
    if way == "stream":
        told = [event["response"] for event in events if event["type"] in ("response.created", "response.in_progress")]
        assert [each["system_fingerprint"] for each in told] == [before, before, named(live)]
        assert ["versions" in each for each in told] == [False, False, True]


def test_what_one_version_wrote_has_no_spans(rollout: Rollout) -> None:
    live = rollout.live
    asked = {"inputs": "the", "parameters": {"adapter_id": NAME, "max_new_tokens": 2, "details": True}}
    assert "versions" not in live.ask("POST", "/generate", json=asked).json()["details"]
    response = live.ask("POST", "/v1/responses", json={"model": NAME, "input": "the", "max_output_tokens": 2}).json()
    assert "versions" not in response
    assert response["system_fingerprint"] == named(live)


def test_a_mode_nobody_knows(live: LiveServer) -> None:
    answer = live.ask("POST", "/resume?mode=hard")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "mode")
