"""What AReaL asks of a vLLM server with LoRA, request by request (areal/engine/vllm_remote.py at 4aef98d8d)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.live_server import LiveServer, live_server
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.served import greedy


def generation(model: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Its payload of a generation, with all that it sends."""
    return {
        "top_p": 1.0,
        "top_k": 100_000_000,
        "max_tokens": tokens,
        "temperature": 0.0,
        "stop_token_ids": [],
        "ignore_eos": True,
        "skip_special_tokens": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 0,
        "use_beam_search": False,
        "stream": False,
        "model": model,
        "prompt": prompt,
    }


def post(live: LiveServer, path: str, payload: dict[str, Any]) -> dict[str, Any]:
    answer = live.ask("POST", path, json=payload)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def drawn(answer: dict[str, Any]) -> tuple[list[int], list[float], str]:
    """As it reads an answer."""
    choice = answer["choices"][0]
    tokens = [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]]
    return tokens, choice["logprobs"]["token_logprobs"], choice["finish_reason"]


def test_two_steps_of_a_training(base: Path, oracle: Any, tmp_path: Path) -> None:
    """Each is loaded under a name of its own while generation is paused; the one before answers on."""
    steps = [make_peft_adapter(oracle, tmp_path / f"{i}", seed=i, r=4, target_modules=ALL) for i in range(2)]
    with live_server(base) as live:
        assert live.ask("GET", "/health").status_code == 200
        prompt = live.tokenizer.encode("the")
        for number, step in enumerate(steps):
            post(live, "/areal_pause_generation", {})
            body = {"lora_path": str(step.folder), "lora_name": f"policy-v{number}"}
            assert live.ask("POST", "/v1/load_lora_adapter", json=body).status_code == 200
            post(live, "/areal_continue_generation", {})
            for earlier, each in enumerate(steps[: number + 1]):
                answer = post(live, "/v1/completions", generation(f"policy-v{earlier}", prompt, 12))
                tokens, logprobs, reason = drawn(answer)
                expected, scores = greedy(each.model, prompt, 12)
                assert (tokens, reason) == (expected, "length")
                assert logprobs == pytest.approx(scores, abs=1e-3)
