"""mistral.rs over closed loops; run by its own environment's Python, by path.

    python mistralrs_worker.py '{"model": DIR, "adapters": ["adapter", ...], "streams": n, "template": FILE}'

It says "ready", and then answers every line {"requests": [{"prompt": text, "adapter": 0 or null}], "tokens": n,
"streams": n} with {"seconds": s, "replies": [{"sent": t, "arrivals": [t], "tokens": n} or {"error": text}]}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any


def runner(options: dict[str, Any]) -> Any:
    """Of the model, its adapters loaded."""
    import mistralrs

    adapters = [mistralrs.LoraAdapter(f"ad{n}", path) for n, path in enumerate(options["adapters"])]
    if adapters:
        which = mistralrs.Which.Lora(options["model"], adapters=adapters, max_adapters=len(adapters))
    else:
        which = mistralrs.Which.Plain(options["model"])
    # Prompts never repeat: kept prefixes would only cost.
    return mistralrs.Runner(
        which,
        max_seqs=options["streams"],
        prefix_cache_n=0,
        jinja_explicit=options["template"],
        token_source="none",
    )


def answer(engine: Any, request: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One request, greedy, exactly `tokens` long; the text is taken as it is, without a chat's template."""
    import mistralrs

    worn = None if request["adapter"] is None else f"ad{request['adapter']}"
    asked = mistralrs.ChatCompletionRequest(
        request["prompt"],
        model="default",
        max_tokens=tokens,
        temperature=0.0,
        stream=True,
        ignore_eos=True,
        adapter=worn,
    )
    reply: dict[str, Any] = {"sent": time.perf_counter(), "arrivals": [], "tokens": 0}
    for chunk in engine.send_chat_completion_request(asked):
        reply["arrivals"].append(time.perf_counter())
        if chunk.usage is not None:
            reply["tokens"] = chunk.usage.completion_tokens
            reply["prompt_tokens"] = chunk.usage.prompt_tokens
    return reply


def closed_loop(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """`streams` requests at any time, each from a thread of its own."""
    queue = list(enumerate(asked["requests"]))[::-1]
    replies: list[dict[str, Any]] = [{} for _ in queue]

    def stream() -> None:
        while True:
            try:
                number, request = queue.pop()
            except IndexError:
                return
            try:
                replies[number] = answer(engine, request, asked["tokens"])
            except Exception as error:  # whatever the library raises
                replies[number] = {"error": f"{type(error).__name__}: {error}"}

    threads = [threading.Thread(target=stream) for _ in range(asked["streams"])]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - start, "replies": replies}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library says there is no answer
    engine = runner(json.loads(sys.argv[1]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(closed_loop(engine, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
