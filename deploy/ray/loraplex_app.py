"""loraplex as a Ray Serve application: replicas that are `loraplex serve` processes, each adapter kept on few of them.

    serve run loraplex_app:app command="loraplex serve demo --adapter-dir examples/adapters" replicas=2

Ray's environment needs ray[serve] and httpx; loraplex is only a command that it starts, in an environment of its own.

    client ---> Ingress --- Ray's multiplexing, by adapter ---> Replica ---> loraplex serve

A request goes to a replica that has answered for its adapter before, else to the one that has the fewest adapters. One
that a replica did not begin to answer, because it died or is stopping, goes to another; so is nothing lost but streams
that had begun.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

logger = logging.getLogger("ray.serve")

MAX_ADAPTERS = 256
"""Of which Ray remembers where they are, per replica: the server's own --max-loras."""

MAX_REQUESTS = 512
"""Open on one replica; the server has a queue of its own, which is fair, so Ray's is not wanted."""

TRIES = 6
FIRST_PAUSE = 0.1
"""Seconds before the second try, doubled from try to try: three in all, by which a dead replica is known to be dead."""

EVERYWHERE = frozenset(
    {
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"),
        *("/load_lora_adapter_from_tensors", "/abort_request"),
    }
)
"""What is said to all replicas. One that starts later does not hear it, but follows --adapter-dir, --adapters-file."""

HOP_BY_HOP = frozenset({"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})

WAITS = httpx.Timeout(None, connect=5)
"""An answer takes as long as it takes; the client, or Ray, says when to give up."""

PR_SET_PDEATHSIG = 1


class Settings(BaseModel):
    """The application's arguments."""

    command: str = "loraplex serve demo"  # without --port; --host only where Prometheus is to reach the servers
    replicas: int = 2
    cpus: float = 1  # of a replica, for Ray's book-keeping; the server's threads are OMP_NUM_THREADS
    gpus: float = 0  # of a replica; Ray shows it the GPU that it gets
    grace_seconds: float = 30  # the server's --grace-seconds


@dataclass(frozen=True)
class Call:
    """A request on its way through."""

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Head:
    """The beginning of an answer; all of it, unless it is a stream."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    streams: bool


class ServerGone(Exception):
    """The replica's server does not answer."""


@serve.deployment(max_ongoing_requests=MAX_REQUESTS, health_check_period_s=5, health_check_timeout_s=20)
class Replica:
    """One `loraplex serve` on a free loopback port. It ends when the server ends, and the server when it ends."""

    async def __init__(self, command: list[str], grace_seconds: float) -> None:
        """Returns once the server takes requests. Raises RuntimeError if it never does."""
        self._stopping = False
        self._grace = grace_seconds
        self._is_local = "--host" not in command
        end_with_parent = _end_with_parent() if sys.platform == "linux" else None
        self._process = await asyncio.create_subprocess_exec(
            *command, "--port", "0", stdout=asyncio.subprocess.PIPE, preexec_fn=end_with_parent
        )
        url = await self._address()
        self._client = httpx.AsyncClient(base_url=url, timeout=WAITS, limits=httpx.Limits(max_connections=None))
        self._watching = asyncio.create_task(self._watch())
        logger.info("the server is at %s", url)

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """A Head, and then the bytes of a stream. Raises ServerGone before the Head; httpx.TransportError after it."""
        try:
            response = await self._client.send(self._request(call), stream=True)
            streams = response.headers.get("content-type", "").startswith("text/event-stream")
            body = b"" if streams else b"".join([piece async for piece in response.aiter_raw()])
        except httpx.TransportError as error:
            raise ServerGone(repr(error)) from None
        try:
            if response.status_code == 200 and (adapter := serve.get_multiplexed_model_id()):
                await self.keep(adapter)
            yield Head(response.status_code, _passed_on(response.headers.multi_items()), body, streams)
            if streams:
                async for piece in response.aiter_raw():
                    yield piece
        finally:
            await response.aclose()

    async def hear(self, call: Call) -> Head:
        """The answer in one piece, for what all replicas are told. Raises ServerGone."""
        async for head in self.answer(call):
            assert isinstance(head, Head)
            return head
        raise AssertionError("an answer has a head")

    @serve.multiplexed(max_num_models_per_replica=MAX_ADAPTERS)
    async def keep(self, adapter: str) -> str:
        """Tell Ray's routers that this adapter is here; loading it, and dropping it, is the server's."""
        return adapter

    async def target(self) -> str:
        """host:port of the server, where Prometheus may find it."""
        url = self._client.base_url
        return f"{url.host if self._is_local else ray.util.get_node_ip_address()}:{url.port}"

    async def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises three times in a row."""
        (await self._client.get("/health", timeout=15)).raise_for_status()

    async def __del__(self) -> None:
        """Ray has let the open requests end; the server still ends what it knows of by itself."""
        self._stopping = True
        if self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), self._grace + 15)
        except TimeoutError:
            self._process.kill()

    async def _address(self) -> str:
        """Out of the line that says where it serves."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            words = line.decode(errors="replace").split()
            if words[:1] == ["loraplex"] and "serves" in words:
                return words[-1]
        raise RuntimeError(f"the server ended with {await self._process.wait()} before it served; its log says why")

    async def _watch(self) -> None:
        """End with the server: Ray learns of a dead actor at once, of a failed check after some."""
        assert self._process.stdout is not None
        async for _ in self._process.stdout:
            pass
        code = await self._process.wait()
        if not self._stopping:
            logger.error("the server ended with %d: so does this replica", code)
            os._exit(1)

    def _request(self, call: Call) -> httpx.Request:
        url = httpx.URL(path=call.path, query=call.query.encode())
        return self._client.build_request(call.method, url, headers=call.headers, content=call.body)


@serve.deployment(max_ongoing_requests=4 * MAX_REQUESTS)
class Ingress:
    """What clients talk to: finds the adapter in a request, and a replica that answers it."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._base_names: frozenset[str] | None = None

    async def __call__(self, request: Request) -> Response:
        """Any route of the server, and GET /replicas: where the servers are, as Prometheus' http_sd wants it."""
        if request.url.path == "/replicas":
            found = await self._replicas.broadcast("target").results_async(return_exceptions=True)
            targets = sorted(target for target in found if isinstance(target, str))  # of those that are alive
            return JSONResponse([{"targets": targets, "labels": {}}])
        headers = _passed_on(request.headers.items())
        call = Call(request.method, request.url.path, request.url.query, headers, await request.body())
        if call.path in EVERYWHERE:
            return await self._tell_all(call)
        return await self._ask(call, await self._adapter_of(call))

    async def _ask(self, call: Call, adapter: str) -> Response:
        """One replica, and another if it does not begin to answer."""
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        for number in range(TRIES):
            if number:
                await asyncio.sleep(FIRST_PAUSE * 2 ** (number - 1))
            pieces = handle.answer.remote(call)
            try:
                head = await anext(pieces)
            except (RayActorError, DeploymentUnavailableError, ServerGone) as error:
                logger.warning("try %d of %d: %r", number + 1, TRIES, error)
                continue
            if head.status != 503 or number == TRIES - 1:  # 503: it is stopping, or its engine is dead
                return _response(head, pieces)
        error = {"message": "no replica answers; try again", "type": "server_error", "code": "no_replica"}
        return JSONResponse({"error": error}, status_code=503, headers={"retry-after": "5"})

    async def _tell_all(self, call: Call) -> Response:
        """The answer of the replica that liked it least."""
        heads: list[Head] = await self._replicas.broadcast("hear", call).results_async()
        return _response(max(heads, key=lambda head: head.status), None)

    async def _adapter_of(self, call: Call) -> str:
        """ "" where there is none: the base is everywhere."""
        name = _model_of(call.body) if call.method == "POST" else ""
        if not name:
            return ""
        if self._base_names is None:
            keys = [(name, value) for name, value in call.headers if name in ("authorization", "x-api-key")]
            models = await self._ask(Call("GET", "/v1/models", "", keys, b""), "")
            if models.status_code != 200:
                return name
            cards = json.loads(models.body)["data"]
            self._base_names = frozenset(card["parent"] or card["id"] for card in cards)
        return "" if name in self._base_names else name


def app(settings: Settings) -> serve.Application:
    """What `serve run` and a Serve config file name."""
    options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
    command = [*shlex.split(settings.command), "--grace-seconds", str(settings.grace_seconds)]
    replicas = Replica.options(
        num_replicas=settings.replicas,
        ray_actor_options=options,
        graceful_shutdown_timeout_s=settings.grace_seconds + 20,
    )
    return Ingress.bind(replicas.bind(command, settings.grace_seconds))


def _model_of(body: bytes) -> str:
    """The adapter in the words of OpenAI, LoRAX or SGLang; "" if the body says none, or is no JSON."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    parameters = found.get("parameters")
    lorax = parameters.get("adapter_id") if isinstance(parameters, dict) else None
    named = (found.get("model"), found.get("lora_path"), lorax)
    return next((name for name in named if isinstance(name, str) and name), "")


def _response(head: Head, pieces: DeploymentResponseGenerator[Any] | None) -> Response:
    response = StreamingResponse(pieces, head.status) if head.streams else Response(head.body, head.status)
    response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
    return response


def _passed_on(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


def _end_with_parent() -> Any:
    """What a child does first, to be told to stop when its parent dies, however that dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork: nothing is loaded between it and exec
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
