"""The same workload for other load generators, so that their figures can be set beside ours.

- aiperf (0.13): JSON lines of its `mooncake_trace` kind. Each holds a whole request as its `payload`, sent as it is,
  and its time in milliseconds: adapter, prompt, lengths and arrivals are all kept.
- guidellm (0.8): JSON lines of its `trace_synthetic` kind: times in seconds and lengths. guidellm makes the prompts and
  asks one model, so adapters are **not** kept; the model named is the workload's first.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplex.benchmarks.load import Address
from loraplex.benchmarks.workload import Planned


def for_aiperf(planned: Sequence[Planned], path: Path, address: Address) -> str:
    """Write `path`; returns the command that replays it. Raises OSError."""
    _write(path, planned, _aiperf_line)
    words = [
        *("aiperf", "profile", "--model", planned[0].request.model, "--url", url(address), "--streaming"),
        *("--endpoint-type", "chat" if planned[0].request.chat else "completions"),
        *("--input-file", str(path), "--custom-dataset-type", "mooncake_trace", "--fixed-schedule"),
        # payloads need no tokenizer, and the server's counts are the ones we use
        *("--use-server-token-count", "--tokenizer", "builtin"),
    ]
    return shlex.join(words)


def for_guidellm(planned: Sequence[Planned], path: Path, address: Address) -> str:
    """Write `path`; returns the command that replays it. Raises OSError."""
    _write(path, planned, _guidellm_line)
    route = "/v1/chat/completions" if planned[0].request.chat else "/v1/completions"
    backend = f"kind=openai_http,target={url(address)},model={planned[0].request.model},request_format={route}"
    data = f"kind=trace_synthetic,path={path}"
    return shlex.join(["guidellm", "run", "--backend", backend, "--profile", "kind=replay", "--data", data])


FORMATS: Mapping[str, Callable[[Sequence[Planned], Path, Address], str]] = {
    "aiperf": for_aiperf,
    "guidellm": for_guidellm,
}


def url(address: Address) -> str:
    """The base URL, without /v1."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{'https' if address.tls else 'http'}://{host}:{address.port}{address.prefix}"


def _write(path: Path, planned: Sequence[Planned], line: Callable[[Planned], Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for each in planned:
            file.write(json.dumps(line(each)) + "\n")


def _aiperf_line(each: Planned) -> Mapping[str, Any]:
    content = each.request.content()
    return {"timestamp": each.at * 1e3, "payload": content, "output_length": each.request.max_tokens}


def _guidellm_line(each: Planned) -> Mapping[str, Any]:
    return {"timestamp": each.at, "input_length": each.prompt_tokens, "output_length": each.request.max_tokens}
