"""A folder of adapters below a whole engine: read when they are wanted, bad, repaired and exchanged while it serves."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.tiers.loader import LoadedContent
from loraplex.server.command.build import EngineParts
from loraplex.server.config_engine import EngineConfig
from loraplex.server.engine.engine import EventStream
from loraplex.server.engine.request import FinishReason, GenerationRequest, SamplingParams
from tests.support.adapter_reading import put
from tests.support.peft_adapters import ALL, make_peft_adapter
from tests.support.refusals import refused
from tests.support.tiny import load_oracle, make_tiny_model
from tests.support.version_world import register_all
from tests.support.whole_engine import whole_engine

WEIGHTS = "adapter_model.safetensors"
PROMPT = tuple(range(4, 30))
LENGTH = 60


class Server:
    """An engine over a folder of adapters."""

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self._count = 0

    def submit(self, name: str, max_tokens: int = LENGTH) -> EventStream:
        self._count += 1
        mix = ((self.parts.adapters.registry.lease(name), 1.0),) if name else ()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return self.parts.engine.submit(GenerationRequest(f"r{self._count}", PROMPT, params, mix))

    def wait_for_loads(self) -> None:
        """Compute nothing, from now on, while adapters are on their way: on this base, an answer takes no longer."""
        loader, worker = self.parts.adapters.loader, self.parts.engine._worker
        ensure, run = loader.ensure, worker.run
        asked: list[Future[LoadedContent]] = []

        def noted(*args: Any) -> Future[LoadedContent]:
            asked.append(ensure(*args))
            return asked[-1]

        def late(prepared: Any) -> Any:
            wait(asked, 60)
            return run(prepared)

        loader.ensure = noted  # type: ignore[method-assign]
        worker.run = late  # type: ignore[method-assign]

    async def answer(self, name: str, max_tokens: int = LENGTH) -> list[int]:
        """Raises what the request fails with."""
        return await rest(self.submit(name, max_tokens))


async def rest(stream: EventStream) -> list[int]:
    found = []
    async for event in stream:
        if event.finish is FinishReason.ERROR:
            assert event.error is not None
            raise event.error
        assert event.token_id is not None
        found.append(event.token_id)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a, b and c of one shape, and wide of another."""
    folder, oracle = tmp_path_factory.mktemp("made"), load_oracle(base)
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "c": 4, "wide": 16}.items()):
        make_peft_adapter(oracle, folder / name, seed=seed, r=rank, target_modules=ALL)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder that is served: a and b."""
    for name in "ab":
        shutil.copytree(made / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
async def server(base: Path, folder: Path) -> AsyncIterator[Server]:
    """With a single slot: whoever comes next drives out who was there."""
    config = EngineConfig(
        device="cpu", dtype="float32", max_model_len=160, max_num_seqs=4, token_budget=64, memory=1 << 28,
        num_slots=1,
    )  # fmt: skip
    async with whole_engine(base, config) as parts:
        register_all(parts.adapters, folder)
        yield Server(parts)


def exchange(folder: Path, made: Path, name: str) -> None:
    """Put the files of `name` into the place of those in `folder`."""
    for file in ("adapter_config.json", WEIGHTS):
        put(folder / file, (made / name / file).read_bytes())


async def test_nothing_is_read_before_it_is_wanted(server: Server) -> None:
    registry, loader = server.parts.adapters.registry, server.parts.adapters.loader
    assert [version.digest for version in registry.list()] == [None, None]
    assert loader.stats().loads == 0
    await server.answer("a", 2)
    a, b = registry.list()
    assert (a.digest is None, b.digest is None, loader.stats().loads) == (False, True, 1)


async def test_a_bad_adapter_fails_its_own_requests_and_works_once_repaired(
    server: Server, folder: Path, made: Path
) -> None:
    expected = await server.answer("a")
    tensors = safetensors.torch.load((folder / "b" / WEIGHTS).read_bytes())
    next(iter(tensors.values()))[0, 0] = float("nan")
    put(folder / "b" / WEIGHTS, safetensors.torch.save(tensors))
    results: list[Any] = await asyncio.gather(*(server.answer(name) for name in "abab"), return_exceptions=True)
    assert results[0] == results[2] == expected
    for error in (results[1], results[3]):
        assert isinstance(error, AdapterRefused)
        assert error.code == "not_finite"
    exchange(folder / "b", made, "b")
    assert await server.answer("b") not in ([], expected)
    assert len(server.parts.adapters.registry.list()) == 2


async def test_a_stream_ends_as_it_began_though_its_files_are_exchanged(
    server: Server, folder: Path, made: Path
) -> None:
    """And though its adapter has to leave the device for another request's: new requests get the new files."""
    expected = {name: await server.answer(name) for name in "ab"}
    server.wait_for_loads()
    streams = [server.submit("a") for _ in range(4)]  # in all places, so that b may take the slot
    first = [await stream.__anext__() for stream in streams]
    exchange(folder / "a", made, "c")
    others = [asyncio.ensure_future(server.answer("b")) for _ in range(3)]
    answers = await asyncio.gather(*map(rest, streams))
    assert [[event.token_id, *answer] for event, answer in zip(first, answers, strict=True)] == [expected["a"]] * 4
    assert await asyncio.gather(*others) == [expected["b"]] * 3
    assert server.parts.engine.stats().preemptions > 0
    while True:
        try:
            found = await server.answer("a")
            break
        except AdapterRefused as error:  # the first to find out
            assert error.code == "changed"  # noqa: PT017
    exchange(folder / "b", made, "c")
    with refused("changed"):
        await server.answer("b")
    assert await server.answer("b") == found != expected["a"]
    assert server.parts.adapters.registry.draining() == ()


async def test_files_of_another_shape(server: Server, folder: Path, made: Path) -> None:
    """Exchanged before they were ever read: nobody has begun with the old ones."""
    exchange(folder / "a", made, "wide")
    with refused("changed"):
        await server.answer("a")
    (version, _) = server.parts.adapters.registry.list()
    assert version.info.rank == 16
    assert len(await server.answer("a")) == LENGTH
