"""The server's own /openapi.json held against its answers: no 5xx, and nothing that it does not announce.

Bodies are drawn from the schema, and from what the schema forbids. Announced are statuses, media types, the shapes of
bodies and of events, and that other bodies and other methods are refused.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)


def no_server_error(ctx: Any, response: Any, case: schemathesis.Case) -> bool | None:
    """A 504 is the announced answer to a request whose own `timeout` is over, be it 5e-324 s; no other 5xx is."""
    if response.status_code == 504 and response.json()["error"]["code"] == "timeout":
        return None
    return not_a_server_error(ctx, response, case)


CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]

schema = schemathesis.openapi.from_url(f"{os.environ['LORAPLEX_URL']}/openapi.json")


@schema.parametrize()
@settings(
    max_examples=10,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_announced(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=CHECKS, timeout=60)


def test_every_route_is_announced() -> None:
    found = {
        f"{operation.method.upper()} {operation.path}" for operation in (r.ok() for r in schema.get_all_operations())
    }
    assert {"POST /v1/chat/completions", "POST /", "POST /v1/load_lora_adapter", "GET /metrics"} <= found
    assert len(found) >= 35


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "wide", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"model": "wide", "prompt": "x", "logprobs": 1, "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"model": "wide", "input": "x", "max_output_tokens": 8}),
        ("/generate", {"text": ["x", "y"], "lora_path": "wide", "return_logprob": True}),
        ("/", {"inputs": "x", "parameters": {"adapter_id": "wide", "return_k_alternatives": 2}}),
    ],
)
def test_streams_are_as_announced(path: str, body: dict[str, Any]) -> None:
    """All of their events, [DONE] among them."""
    case = schema[path]["POST"].Case(body={**body, "stream": True}, media_type="application/json")
    response = case.call(timeout=60)
    case.validate_response(response, checks=CHECKS)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    assert response.content.count(b"data: ") > 2
