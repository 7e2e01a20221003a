"""TRL's AsyncGRPO against the server, its code unchanged: what it looks at, its pushes of adapters, its rollouts.

The trainer itself needs a GPU and vLLM beside it; all that it asks of a server is asked here by its own parts, in the
order of AsyncGRPOTrainer._sync_weight_lora().
"""

from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import requests
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from trl.experimental.async_grpo.async_grpo_trainer import select_adapter_sync
from trl.experimental.async_grpo.async_rollout_worker import _AsyncRolloutLoop
from trl.experimental.async_grpo.vllm_client import VLLMClient

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
RESPONSES = {  # of templates that TRL knows, it has this by itself
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant: ",
    "fields": {"content": {"close_pattern": "</s>", "content": "text"}},
}
NAME, CLOSE, SECONDS = "trl-policy", 2e-4, 60.0


@pytest.fixture(scope="module")
def client(url: str) -> VLLMClient:
    PartialState(cpu=True)  # the trainer's, without which TRL's log has no voice
    found = VLLMClient(url)
    found.wait_for_server_ready()
    return found


@pytest.fixture(scope="module")
def base(client: VLLMClient) -> Path:
    """The checkpoint that is served."""
    return Path(client.get_server_info()["model_config"]["model"])


@pytest.fixture(scope="module")
def policy(base: Path) -> Any:
    """What is trained: an adapter that changes a little with every step()."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


def step(policy: Any) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def sync(client: VLLMClient, policy: Any, folder: Path, version: int) -> None:
    """As AsyncGRPOTrainer._sync_weight_lora() does, with a staleness of 1."""
    client.pause()
    policy.save_pretrained(folder / f"v{version}")
    client.load_lora_adapter(f"{NAME}-v{version}", str(folder / f"v{version}"))
    client.resume()
    client.unload_lora_adapter(f"{NAME}-v{version - 2}")


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(each))) for each in completions]


class Rollouts:
    """The loop that TRL runs in a process of its own, here in a thread."""

    def __init__(self, url: str, base: Path, **sampling: Any) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.response_template = RESPONSES
        context = multiprocessing.get_context("spawn")
        self.version = context.Value("i", 0)
        self.buffer = context.Queue(2)  # so that it runs no further ahead than it must
        self.failed = context.Event()
        self.loop = _AsyncRolloutLoop(
            model_name="tiny",
            dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in ("hi", "the", "a")]),
            reward_funcs=[reward],
            processing_class=tokenizer,
            eos_token_ids=[tokenizer.eos_token_id],
            rollout_buffer=self.buffer,
            model_version_value=self.version,
            heartbeat_value=context.Value("d", 0.0),
            failed_event=self.failed,
            exception_info_queue=context.Queue(),
            metrics_queue=context.Queue(),
            num_generations=2,
            max_inflight_tasks=4,
            score_queue_maxsize=1,
            vllm_server_url=url,
            lora_name=NAME,
            max_tokens=8,
            **sampling,
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)

    def __enter__(self) -> Rollouts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.loop._loop.call_soon_threadsafe(self.loop._stop_event.set)
        self._thread.join(SECONDS)

    def sample(self) -> Any:
        return self.buffer.get(timeout=SECONDS)


def test_what_it_looks_at_first(client: VLLMClient, policy: Any) -> None:
    assert client.get_max_model_len() == 128
    assert client.get_dtype() == "torch.float32"
    assert client.get_world_size() == 1
    assert select_adapter_sync(client.get_server_info(), policy, SimpleNamespace(max_staleness=4)) is True


def test_rollouts_are_of_the_version_they_name(
    client: VLLMClient, policy: Any, tmp_path: Path, url: str, base: Path
) -> None:
    """Every token's log-probability is that of the policy's weights when its version was pushed."""
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def publish(version: int) -> None:
        step(policy)
        sync(client, policy, tmp_path, version)
        kept[version] = {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    publish(0)
    with Rollouts(url, base, temperature=1.0) as rollouts:
        samples = [rollouts.sample() for _ in range(4)]
        for version in (1, 2):
            publish(version)
            rollouts.version.value = version
            samples += [rollouts.sample() for _ in range(20)]
    assert not rollouts.failed.is_set()
    seen = set()
    for sample in samples:
        ids, mask = list(sample.input_ids), list(sample.completion_mask)
        told = [logprob for logprob, kind in zip(sample.old_log_probs, mask, strict=True) if kind]
        assert told
        versions = []
        for version, weights in kept.items():
            policy.load_state_dict(weights)
            with torch.no_grad():
                rows = policy(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            expected = [float(rows[at - 1, ids[at]]) for at, kind in enumerate(mask) if kind]
            if max(abs(a - b) for a, b in zip(told, expected, strict=True)) < CLOSE:
                versions.append(version)
        assert len(versions) == 1, sample
        seen.update(versions)
    assert seen == {0, 1, 2}
    names = {card["id"] for card in requests.get(f"{url}/v1/models", timeout=SECONDS).json()["data"]}
    assert {name for name in names if name.startswith(NAME)} == {f"{NAME}-v1", f"{NAME}-v2"}
    for version in (1, 2):
        client.unload_lora_adapter(f"{NAME}-v{version}")


def test_a_pause_keeps_what_is_under_way(client: VLLMClient, policy: Any, tmp_path: Path, url: str, base: Path) -> None:
    sync(client, policy, tmp_path, 0)
    with Rollouts(url, base, temperature=1.0) as rollouts:
        for _ in range(3):
            client.pause()
            assert requests.get(f"{url}/is_paused", timeout=SECONDS).json() == {"is_paused": True}
            client.resume()
            assert len(rollouts.sample().input_ids)
    assert not rollouts.failed.is_set()
    client.unload_lora_adapter(f"{NAME}-v0")
