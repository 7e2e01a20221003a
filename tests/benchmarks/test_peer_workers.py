"""The closed loops that run in other programs' environments, over programs that are made up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from loraplex.benchmarks.peers import mistralrs_worker, openvino_worker, piped
from loraplex.benchmarks.peers.peer import Skipped
from loraplex.benchmarks.readme_loads import OUTPUT_TOKENS, Load


class Pipe:
    """As OpenVINO GenAI's: a token of every request a step; add_request knows no adapters, generate takes one set."""

    def __init__(self) -> None:
        self.running: list[Handle] = []
        self.most = 0
        self.prompts: list[list[int]] = []
        self.worn: list[str] = []

    def add_request(self, number: int, prompt: Any, config: Any) -> Handle:
        assert not hasattr(config, "adapters")
        self.prompts.append(prompt)
        self.running.append(Handle(config.max_new_tokens))
        return self.running[-1]

    def has_non_finished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> None:
        self.most = max(self.most, len(self.running))
        for handle in self.running:
            handle.unread += 1
            handle.left -= 1
        self.running = [handle for handle in self.running if handle.left]

    def generate(self, prompts: list[Any], configs: list[Any], streamer: Any) -> list[Any]:
        (prompt,), (config,) = prompts, configs
        self.prompts.append(prompt)
        self.worn.append(config.adapters)
        for _ in range(config.max_new_tokens):
            assert streamer.write(7) == "running"
        return [SimpleNamespace(m_generation_ids=[[7] * config.max_new_tokens])]


class Handle:
    def __init__(self, left: int) -> None:
        self.left, self.unread = left, 0

    def can_read(self) -> bool:
        return self.unread > 0

    def read(self) -> dict[int, Any]:
        self.unread -= 1
        return {0: SimpleNamespace(generated_ids=[7])}


@pytest.fixture
def genai(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "openvino_genai": {
            "GenerationConfig": SimpleNamespace,
            "AdapterConfig": lambda: "none",
            "StreamerBase": object,
            "StreamingStatus": SimpleNamespace(RUNNING="running"),
        },
        "openvino": {"Tensor": lambda values: values.tolist()[0]},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def asked(adapters: list[int | None], streams: int, tokens: int = 3) -> dict[str, Any]:
    requests = [{"prompt": [n, 5], "adapter": adapter} for n, adapter in enumerate(adapters)]
    return {"requests": requests, "tokens": tokens, "streams": streams}


@pytest.mark.usefixtures("genai")
def test_openvinos_streams() -> None:
    pipe = Pipe()
    told = openvino_worker.answer(pipe, [], asked([None] * 5, 2))
    assert pipe.most == 2
    assert pipe.prompts == [[n, 5] for n in range(5)]
    assert [reply["tokens"] for reply in told["replies"]] == [3] * 5
    for reply in told["replies"]:
        assert reply["sent"] < reply["arrivals"][0] < reply["arrivals"][-1] <= reply["sent"] + told["seconds"]
        assert len(reply["arrivals"]) == 3


@pytest.mark.usefixtures("genai")
def test_openvino_wears_one_adapter_at_a_time() -> None:
    """A request waits for those before it, and is on its way from when its stream was free."""
    pipe = Pipe()
    told = openvino_worker.answer(pipe, ["a", "b"], asked([0, 1, None, 0], 2))
    assert pipe.worn == ["a", "b", "none", "a"]
    assert [prompt[0] for prompt in pipe.prompts] == [0, 1, 2, 3]
    replies = told["replies"]
    assert [(reply["tokens"], len(reply["arrivals"])) for reply in replies] == [(3, 3)] * 4
    assert replies[0]["sent"] == replies[1]["sent"] < replies[0]["arrivals"][-1]
    for reply, before, next_before in zip(replies[2:], replies, replies[1:], strict=False):
        assert before["arrivals"][-1] <= reply["sent"] <= next_before["arrivals"][0]


class Engine:
    """As mistral.rs's Runner: a generator of chunks, the last with the counts."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier, self.requests = barrier, list[Any]()

    def send_chat_completion_request(self, request: Any) -> Iterator[Any]:
        self.requests.append(request)
        self.barrier.wait(10)  # all streams are under way at once
        for left in range(request.max_tokens)[::-1]:
            usage = None if left else SimpleNamespace(completion_tokens=request.max_tokens, prompt_tokens=2)
            yield SimpleNamespace(usage=usage)


def test_mistralrs_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("mistralrs")
    vars(module)["ChatCompletionRequest"] = lambda prompt, **fields: SimpleNamespace(prompt=prompt, **fields)
    monkeypatch.setitem(sys.modules, "mistralrs", module)
    engine = Engine(threading.Barrier(2))
    told = mistralrs_worker.closed_loop(engine, asked([0, 1, None, 0], 2))
    assert sorted(request.adapter or "" for request in engine.requests) == ["", "ad0", "ad0", "ad1"]
    assert all(request.ignore_eos and request.temperature == 0.0 for request in engine.requests)
    assert [(reply["tokens"], len(reply["arrivals"])) for reply in told["replies"]] == [(3, 3)] * 4


PROGRAM = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    tokens = min(asked["tokens"], int(sys.argv[1]))
    times = [2.0 + 0.5 * n for n in range(tokens)]
    replies = [{"sent": 1.0, "arrivals": times, "tokens": tokens} for _ in asked["requests"]]
    adapters = [request["adapter"] for request in asked["requests"]]
    print(adapters, [request["prompt"] for request in asked["requests"]], file=sys.stderr, flush=True)
    print(json.dumps({"seconds": 10.0, "replies": replies}), flush=True)
"""


def test_a_program_is_asked_for_a_load() -> None:
    load = Load("some", 2, 3, 5)
    with piped.worker("some", [sys.executable, "-c", PROGRAM, "64"]) as running:
        program = piped.Piped(running, lambda prompt: f"{len(prompt)} words")
        program.warm(load)
        figures = program.measure(load, 0)
        assert (figures.tokens_per_second, figures.first, figures.decode) == (5 * OUTPUT_TOKENS / 10, 1.0, 2.0)
        running.process.kill()
        with pytest.raises(RuntimeError, match="some ended"):
            program.measure(load, 1)


def test_a_program_that_gives_too_little_is_an_error() -> None:
    with (
        piped.worker("some", [sys.executable, "-c", PROGRAM, "10"]) as running,
        pytest.raises(RuntimeError, match="some gave 10 tokens instead of 64"),
    ):
        piped.Piped(running).measure(Load("some", 1, 0, 1), 0)


def test_a_program_that_does_not_begin_is_left_out() -> None:
    with (
        pytest.raises(Skipped, match="no such model"),
        piped.worker("some", [sys.executable, "-c", "import sys; sys.exit('no such model')"]),
    ):
        pass
