"""OpenVINO GenAI's ContinuousBatchingPipeline over closed loops; run by its own environment's Python, by path.

    python openvino_worker.py MODEL '{"cores": 2, "adapters": ["a.safetensors", ...], "batched": 256}'

It says "ready", and then answers every line {"requests": [{"prompt": [ids], "adapter": 0 or null}], "tokens": n,
"streams": n} with {"seconds": s, "replies": [{"sent": t, "arrivals": [t], "tokens": n}]}. All requests of a batch must
wear the same adapter, says the pipeline: one that wears another waits until those under way are done.
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
        **options.get("properties", {}),
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


def closed_loop(pipe: Any, worn: list[Any], asked: dict[str, Any]) -> dict[str, Any]:
    """`streams` requests at any time; one is sent when the one before it on its stream is done."""
    import numpy as np
    from openvino import Tensor

    queue = list(enumerate(asked["requests"]))[::-1]
    replies: list[dict[str, Any]] = [{} for _ in queue]
    waiting: list[int] = []
    running: dict[int, Any] = {}
    worn_now: int | None = None
    start = time.perf_counter()
    while queue or waiting or running:
        while queue and len(waiting) + len(running) < asked["streams"]:
            number, _ = queue.pop()
            replies[number] = {"sent": time.perf_counter(), "arrivals": [], "tokens": 0}
            waiting.append(number)
        for number in list(waiting):
            request = asked["requests"][number]
            if running and request["adapter"] != worn_now:
                break
            worn_now = request["adapter"]
            config = settings(asked["tokens"], None if worn_now is None else worn[worn_now])
            prompt = Tensor(np.array([request["prompt"]], dtype=np.int64))
            running[number] = pipe.add_request(number, prompt, config)
            waiting.remove(number)
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


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library says there is no answer
    model, options = sys.argv[1], json.loads(sys.argv[2])
    pipe, worn = pipeline(model, options)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(closed_loop(pipe, worn, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
