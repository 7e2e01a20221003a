"""What SGLang's router asks a server about itself: its load, and what it serves.

/health and /ready, which they ask most, are in ops.py.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from loraplex.adapters.format.config import MAX_RANK
from loraplex.server.api.services import Services
from loraplex.server.version import version


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.get("/get_load")
    async def get_load() -> Response:
        """Work that is there, one record per engine: the power-of-two policy sends to whom has fewer tokens."""
        return JSONResponse([_load(services)])

    @router.get("/server_info")
    @router.get("/get_server_info")
    async def server_info() -> Response:
        """What is served, and how much of it at once. Routers know a worker by its served_model_name."""
        return JSONResponse(_server_info(services))

    @router.get("/model_info")
    @router.get("/get_model_info")
    async def model_info() -> Response:
        """The base."""
        return JSONResponse(_model_info(services))

    return router


def _load(services: Services) -> dict[str, Any]:
    """As SGLang counts: tokens in the KV cache and of prompts that wait; its num_reqs has the waiting ones too."""
    stats = services.engine.stats()
    return {
        "dp_rank": 0,
        "num_reqs": stats.running + stats.waiting,
        "num_waiting_reqs": stats.waiting,
        "num_tokens": round(stats.kv_usage * services.facts.cache_tokens) + stats.queued_tokens,
    }


def _server_info(services: Services) -> dict[str, Any]:
    facts = services.facts
    return {
        "model_path": facts.config.base,
        "tokenizer_path": facts.config.base,
        "served_model_name": facts.names[0],
        "dtype": facts.dtype,
        "quantization": facts.formats.weights or None,
        "device": facts.device,
        "tp_size": 1,
        "dp_size": 1,
        "enable_lora": True,
        "max_loaded_loras": None,  # any number
        "max_loras_per_batch": facts.config.engine.num_slots,
        "max_running_requests": facts.config.engine.max_num_seqs,
        "max_total_num_tokens": facts.cache_tokens,
        "max_req_input_len": facts.max_model_len - 1,
        "internal_states": [_load(services)],
        "version": version(),
        "vllm_config": _configuration(services),
    }


def _model_info(services: Services) -> dict[str, Any]:
    return {
        "model_path": services.facts.config.base,
        "tokenizer_path": services.facts.config.base,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": None,
        "architectures": None,
    }


def _configuration(services: Services) -> dict[str, Any]:
    """Tell what trainers look at of vLLM's configuration (TRL's get_server_info)."""
    facts = services.facts
    return {
        "model_config": {
            "model": facts.config.base,
            "served_model_name": list(facts.names),
            "dtype": f"torch.{facts.formats.dtype}",
            "max_model_len": facts.max_model_len,
        },
        "lora_config": {
            "max_lora_rank": MAX_RANK,
            "max_loras": facts.config.engine.num_slots,
            "lora_dtype": f"torch.{facts.formats.dtype}",
        },
        "parallel_config": {"world_size": 1, "tensor_parallel_size": 1, "data_parallel_size": 1},
    }
