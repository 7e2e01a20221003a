"""What /openapi.json says. That answers are as it says is schemathesis' to find out (tests/clients)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from loraplex.server.api.chat_schemas import ChatDelta, ChatMessage, FunctionCall, ToolCall, ToolCallDelta
from loraplex.server.api.openapi import inlined


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/openapi.json")).json()


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_tells_how_it_fails(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        failures = {status: response for status, response in operation["responses"].items() if status != "200"}
        assert "500" in failures, name
        for status, response in failures.items():
            assert response["content"]["application/json"]["schema"], (name, status)
    assert "HTTPValidationError" not in str(document)  # FastAPI's own, which is never sent


def test_media_types(document: dict[str, Any]) -> None:
    good = {name: set(found["responses"]["200"].get("content", {})) for name, found in operations(document).items()}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate", "/"):
        assert good[f"POST {path}"] == {"application/json", "text/event-stream"}
    for name in ("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter", "GET /metrics"):
        assert good[name] == {"text/plain"}
    assert good["GET /health"] == set()


def test_prompts_and_stops_are_told_as_they_may_be_sent(document: dict[str, Any]) -> None:
    body = operations(document)["POST /v1/completions"]["requestBody"]["content"]["application/json"]["schema"]
    for fields in (
        {"prompt": "x", "stop": "y"},
        {"prompt": ["x", "y"], "stop": ["y"]},
        {"prompt": [1, 2], "stop": None},
        {"prompt": [[1], [2]]},
    ):
        jsonschema.validate({"model": "base", **fields}, body)
    for fields in ({"prompt": []}, {"prompt": 1}, {"prompt": "x", "stop": 3}, {"prompt": "x", "stop": ""}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"model": "base", **fields}, body)


def test_records_written_by_hand_are_as_their_schemas_say() -> None:
    """The chunks of a tool call, and the message that it makes."""
    call = ToolCall(id="c", function=FunctionCall(name="f", arguments="{}"))
    deltas = [
        ChatDelta(role="assistant", content=""),
        ChatDelta(tool_calls=[ToolCallDelta(index=0, id="c", name="f")]),
        ChatDelta(tool_calls=[ToolCallDelta(index=0, arguments="{}")]),
        ChatDelta(),
    ]
    for record in (*deltas, ChatMessage(content=None, tool_calls=[call]), ChatMessage(content="x")):
        schema = inlined(type(record), "serialization")
        jsonschema.validate(record.model_dump(mode="json"), schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**record.model_dump(mode="json"), "role": "user"}, schema)


async def test_a_fault_in_the_query_is_told_as_any_other(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/responses/resp_1", params={"stream": "perhaps"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "stream")
    assert error["message"].startswith("stream: ")


async def test_tokenizer_info(client: httpx.AsyncClient, tokenizer_folder: Path) -> None:
    """What clients that look for vLLM's route build their own tokenizer of."""
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(tokenizer_folder)
    found = (await client.get("/tokenizer_info")).json()
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
    assert {name: found[name] for name in names} == {name: getattr(oracle, name) for name in names}
