"""Traces of the real process, as a collector gets them over the wire."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.command import address, serving
from tests.support.otlp_collector import otlp_collector
from tests.support.peft_adapters import make_peft_adapter
from tests.support.waiting import LIMIT

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def plain(value: AnyValue) -> object:
    found = getattr(value, value.WhichOneof("value") or "string_value")
    return [plain(each) for each in found.values] if value.HasField("array_value") else found


def attributes(span: Span) -> dict[str, object]:
    return {attribute.key: plain(attribute.value) for attribute in span.attributes}


def test_a_request_is_a_tree_of_spans(base: Path, oracle: Any, tmp_path: Path) -> None:
    """Down to the first use of an adapter that nobody has read yet; what is left is sent at the end."""
    folder = tmp_path / "adapters" / "sql"
    make_peft_adapter(oracle, folder, r=2, target_modules=["q_proj"])
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    with otlp_collector() as collector:
        arguments = [str(base), "--adapter-dir", str(folder.parent), "--otlp-endpoint", collector.endpoint]
        with serving(*arguments) as (process, lines):
            body = {"model": "sql", "prompt": "the secret", "max_tokens": 5, "ignore_eos": True, "n": 2}
            headers = {"traceparent": PARENT, "x-request-id": "mine"}
            answer = httpx.post(f"{address(lines)}/v1/completions", json=body, headers=headers, timeout=LIMIT)
            assert answer.status_code == 200, answer.text
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=LIMIT)
            assert process.returncode == 0
        spans = {span.span_id: span for span in collector.spans if span.trace_id.hex() == PARENT.split("-")[1]}
    [root] = [span for span in spans.values() if span.parent_span_id.hex() == PARENT.split("-")[2]]
    assert (root.name, root.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    told = attributes(root)
    assert (told["loraplex.request_id"], told["gen_ai.request.model"]) == ("mine", "sql")
    assert (told["http.response.status_code"], told["gen_ai.usage.output_tokens"]) == (200, 10)
    choices = [span for span in spans.values() if span.parent_span_id == root.span_id]
    assert [span.name for span in choices] == ["choice", "choice"]
    for choice in choices:
        told = attributes(choice)
        assert told["loraplex.adapter.name"] == ["sql"]
        assert told["loraplex.adapter.digest"] == [hashlib.sha256(b"".join(files)).hexdigest()]
        assert (told["gen_ai.usage.output_tokens"], told["gen_ai.response.finish_reasons"]) == (5, ["length"])
        phases = {span.name: span for span in spans.values() if span.parent_span_id == choice.span_id}
        assert phases.keys() == {"queue", "load", "prefill", "decode"}
        for span in phases.values():
            inside = (root.start_time_unix_nano, choice.start_time_unix_nano, span.start_time_unix_nano)
            assert list(inside) == sorted(inside)
            assert span.start_time_unix_nano <= span.end_time_unix_nano <= choice.end_time_unix_nano
        assert phases["prefill"].end_time_unix_nano == phases["decode"].start_time_unix_nano
        assert phases["load"].end_time_unix_nano <= phases["prefill"].end_time_unix_nano
        assert phases["decode"].end_time_unix_nano == choice.end_time_unix_nano
    assert all(b"secret" not in body for _, body in collector.got)
