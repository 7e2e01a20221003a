"""Neither keys nor prompts reach a log, whatever goes wrong: every logger is heard at DEBUG."""

from __future__ import annotations

import logging

import httpx
import pytest

from loraplex.server.engine.request import EngineDead, Overloaded
from loraplex.server.tenancy.rate_limits import Limits
from loraplex.server.tenancy.tenants import Key, digest_of
from tests.support.fake_serving import FakeServer, access_of

KEY, OTHER = "lpx_correct-horse", "lpx_battery-staple"
PROMPT = "my diagnosis is xylophonitis"
SECRETS = (KEY, OTHER, "correct-horse", "battery-staple", digest_of(KEY).hex(), "xylophonitis")


async def every_kind_of_request(client: httpx.AsyncClient) -> set[int]:
    """Returns the statuses that were seen."""
    message = {"role": "user", "content": PROMPT}
    bodies = [
        {"model": "base", "prompt": PROMPT},
        {"model": "base", "prompt": PROMPT, "stream": True},
        {"model": "base", "prompt": PROMPT, "echo": True, "logprobs": 1},
        {"model": PROMPT, "prompt": PROMPT},
        {"model": "base", "prompt": [PROMPT, 3]},
        {"model": "base", "prompt": PROMPT, "max_tokens": PROMPT},
        {"model": "base", "prompt": PROMPT, PROMPT: PROMPT},
        {"model": "base", "prompt": PROMPT, "suffix": PROMPT},
        {"model": "base", "prompt": PROMPT * 10},
        {"model": "base", "prompt": PROMPT, "guided_json": {"type": PROMPT}},
        {"model": "base", "prompt": PROMPT, "guided_regex": f"({PROMPT}"},
        {"model": "base", "prompt": PROMPT, "stop": [PROMPT] * 99},
        {"model": "base", "messages": [message]},
        {"model": "base", "messages": [message, {"role": PROMPT, "content": PROMPT}]},
        {"model": "base", "messages": [{**message, "tool_calls": [{"id": PROMPT}]}]},
        {"model": "base", "input": PROMPT},
        {"model": "base", "input": PROMPT, "background": True},
        {"inputs": PROMPT, "parameters": {"adapter_id": "absent", "api_token": KEY}},
        {"inputs": PROMPT, "parameters": {"temperature": PROMPT}},
        {"lora_name": "x", "lora_path": "missing", "api_token": KEY},
        {"rid": PROMPT},
    ]
    paths = (
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize"),
        *("/generate", "/generate_stream", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter"),
        *("/unload_lora_adapter", "/abort_request"),
    )
    statuses = set()
    for path in paths:
        for body in bodies:
            statuses.add((await client.post(path, json=body)).status_code)
        for raw in (f'{{"prompt": "{PROMPT}', f"{PROMPT}".encode("utf-16"), "[" * 5000 + PROMPT, PROMPT * 9000):
            statuses.add((await client.post(path, content=raw)).status_code)
        for headers in (
            {"Authorization": f"Bearer {OTHER}", "x-api-key": OTHER},
            {"Authorization": f"Basic {OTHER}", "x-api-key": f"{OTHER}" * 100},
        ):
            statuses.add((await client.post(path, json=bodies[0], headers=headers)).status_code)
        statuses.add((await client.get(f"{path}?key={KEY}&prompt={PROMPT}")).status_code)
    return statuses


@pytest.mark.parametrize("trouble", ["none", "bug", "dead", "overloaded", "midway", "limited"])
async def test_keys_and_prompts_are_never_logged(
    server: FakeServer, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    failures = {"bug": RuntimeError("a bug"), "dead": EngineDead("stopped"), "overloaded": Overloaded("full", 1.0)}
    server.engine.refusal = failures.get(trouble)
    if trouble == "midway":
        server.engine.break_off(RuntimeError("a bug"), after=1)
    limits = Limits(tokens_per_minute=30) if trouble == "limited" else Limits()
    access = access_of({KEY: Key("k", "acme", admin=True, limits=limits)})
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    before = [(logger, logger.level) for logger in loggers if not logger.name.startswith(("httpx", "httpcore"))]
    caplog.set_level(logging.DEBUG)
    try:
        for logger, _ in before:
            logger.setLevel(logging.DEBUG)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # the test's own client tells of its URLs
        client = server.client(KEY, access=access)
        statuses = await every_kind_of_request(client)
    finally:
        for logger, level in before:
            logger.setLevel(level)
    wanted = {"none": 200, "bug": 500, "dead": 503, "overloaded": 429, "midway": 500, "limited": 429}
    assert {400, 401, 404, 405, 413, wanted[trouble]} <= statuses
    if trouble in ("bug", "midway"):
        assert "a bug" in caplog.text  # it is heard at all
    for secret in SECRETS:
        assert secret not in caplog.text
    for record in caplog.records:
        assert not any(secret in str(vars(record)) for secret in SECRETS)
