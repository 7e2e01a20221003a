"""OpenVINO GenAI's ContinuousBatchingPipeline over closed loops; run by its own environment's Python, by path.

    python openvino_worker.py MODEL '{"cores": 2, "adapters": ["a.safetensors", ...], "batched": 2048}'

It says "ready", and then answers every line {"requests": [{"prompt": [ids], "adapter": 0 or null}], "tokens": n,
"streams": n} with {"seconds": s, "replies": [{"sent": t, "arrivals": [t], "tokens": n}]}. Where there are adapters, one
request is answered after the other: add_request pays no heed to them, and generate takes one set of them for its batch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def pipeline(model: str, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The pipeline, and for every adapter the settings that put it on."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = options["batched"]
    scheduler.max_num_seqs = 256  # its default
    scheduler.enable_prefix_caching = False  # prompts never repeat
    scheduler.cache_size = 1  # GB, far more than any load holds
    properties: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": options["cores"],
    }
    adapters = [genai.Adapter(path) for path in options["adapters"]]
    if adapters:
        properties["adapters"] = genai.AdapterConfig(adapters)
    worn = [genai.AdapterConfig(adapter, 1.0) for adapter in adapters]
    return genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties), worn


def settings(tokens: int, adapter: Any) -> Any:
    """Of one request: greedy, exactly `tokens` long."""
    import openvino_genai as genai

    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    if adapter is not None:
        config.adapters = adapter
    return config


def answer(pipe: Any, worn: list[Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a line asks for."""
    return in_turn(pipe, worn, asked) if worn else closed_loop(pipe, asked)


def tensor(request: dict[str, Any]) -> Any:
    """A request's prompt."""
    import numpy as np
    from openvino import Tensor

    return Tensor(np.array([request["prompt"]], dtype=np.int64))


def closed_loop(pipe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """`streams` requests at any time; one is sent when the one before it on its stream is done."""
    queue = list(enumerate(asked["requests"]))[::-1]
    replies: list[dict[str, Any]] = [{} for _ in queue]
    running: dict[int, Any] = {}
    config = settings(asked["tokens"], None)
    start = time.perf_counter()
    while queue or running:
        while queue and len(running) < asked["streams"]:
            number, request = queue.pop()
            replies[number] = {"sent": time.perf_counter(), "arrivals": [], "tokens": 0}
            running[number] = pipe.add_request(number, tensor(request), config)
        pipe.step()
        for number, handle in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    replies[number]["arrivals"].append(time.perf_counter())
                    replies[number]["tokens"] += len(output.generated_ids)
            if replies[number]["tokens"] >= asked["tokens"]:
                del running[number]
    while pipe.has_non_finished_requests():
        pipe.step()
    return {"seconds": time.perf_counter() - start, "replies": replies}


def in_turn(pipe: Any, worn: list[Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Likewise, of requests that wait for each other: each counts from when the one `streams` before it was done."""
    import openvino_genai as genai

    class Watch(genai.StreamerBase):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.arrivals: list[float] = []

        def write(self, token: Any) -> Any:
            self.arrivals += [time.perf_counter()] * (len(token) if isinstance(token, list) else 1)
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    replies: list[dict[str, Any]] = []
    ended = [time.perf_counter()] * asked["streams"]
    start = ended[0]
    for request in asked["requests"]:
        adapter = genai.AdapterConfig() if request["adapter"] is None else worn[request["adapter"]]
        watch = Watch()
        (result,) = pipe.generate([tensor(request)], [settings(asked["tokens"], adapter)], watch)
        tokens = len(result.m_generation_ids[0])
        replies.append({"sent": ended[-asked["streams"]], "arrivals": watch.arrivals, "tokens": tokens})
        ended.append(time.perf_counter())
    return {"seconds": ended[-1] - start, "replies": replies}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library says there is no answer
    model, options = sys.argv[1], json.loads(sys.argv[2])
    pipe, worn = pipeline(model, options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(pipe, worn, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
