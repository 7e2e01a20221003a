"""Adapters saved by PEFT, read, packed, loaded into the arena and run by our decoder: the logits are PEFT's own, fp32.

Every option of every kind alone; then all of a base's in one batch with rows of the base, chunks and decode rows mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex.kernels.ops import Backend
from loraplex.kernels.quantized import Activations, QuantizedWeight, dequantize
from loraplex.kernels.select import load_backend
from loraplex.server.models.opening import open_checkpoint
from loraplex.server.models.quantizing import QuantizingCheckpoint
from tests.support.adapter_server import LENGTH, Request, Server, tokens
from tests.support.peft_adapters import (
    ALL,
    BASES,
    CASES,
    IA3_CASES,
    MODULE_KIND_CASES,
    QV,
    PeftAdapter,
    make_peft_adapter,
    randomise_adapter,
)
from tests.support.tiny import load_oracle, make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of much that is meant here

TOLERANCE = 2e-4
"""Logits have a spread of two and more; fp32 in another order of summing stays under 5e-5."""

VISIBLE = 0.1
"""By how much an adapter must move some logit, or the comparison shows nothing."""

EVERY = {**CASES, **IA3_CASES, **MODULE_KIND_CASES}


@dataclass
class Base:
    """One tiny base, on our side and on transformers', and the adapters of all cases made for it."""

    hf: Any
    path: Path
    adapters: dict[str, PeftAdapter]

    def logits(self, ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.hf(torch.tensor([ids])).logits[0].float()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    made = {}
    for family, fields in BASES.items():
        path = make_tiny_model(family, root / family, **fields)
        hf = load_oracle(path)
        adapters = {
            case: make_peft_adapter(hf, root / f"{family}-{i}", seed=i, **options)
            for i, (case, (of, options)) in enumerate(EVERY.items(), 1)
            if of == family
        }
        made[family] = Base(hf, path, adapters)
    return made


@pytest.fixture
def servers(bases: dict[str, Base]) -> dict[str, Server]:
    """Fresh ones for every test, made when asked for."""

    class Lazy(dict[str, Server]):
        def __missing__(self, family: str) -> Server:
            self[family] = Server(bases[family].path)
            return self[family]

    return Lazy()


def assert_same(request: Request, wanted: Tensor, what: str) -> None:
    found = torch.cat(request.logits)
    assert wanted.std() > 0.5, "the oracle's logits are too flat to tell anything"
    worst = float((found - wanted).abs().max())
    assert worst < TOLERANCE, f"{what}: logits are off by {worst}"


@pytest.mark.parametrize("case", EVERY)
def test_alone(bases: dict[str, Base], servers: dict[str, Server], case: str) -> None:
    """In one prefill, and again in small chunks and decode steps."""
    base = bases[EVERY[case][0]]
    server = servers[EVERY[case][0]]
    mix = ((server.load(base.adapters[case].folder), 1.0),)
    whole = Request(tokens(1), mix, prompt=LENGTH)
    pieces = Request(tokens(1), mix, prompt=LENGTH - 6, chunk=5)
    wanted = base.adapters[case].logits(tokens(1))
    assert float((wanted - base.logits(tokens(1))).abs().max()) > VISIBLE, "PEFT's own answer is the base's"
    for request in (whole, pieces):
        server.run([request])
        assert_same(request, wanted, case)


@pytest.mark.parametrize("family", BASES)
def test_all_mixed_in_one_batch(bases: dict[str, Base], servers: dict[str, Server], family: str) -> None:
    """All of a base's adapters at once, two sequences for some, rows of the base between; they join at different steps,
    so that chunks of some stand beside decode rows of others. Every row is what PEFT computes for it alone, and the
    base's rows are bit for bit what the same batch gives when nobody wears an adapter."""
    base, server = bases[family], servers[family]
    requests = {}
    for i, (case, adapter) in enumerate(base.adapters.items()):
        digest = server.load(adapter.folder)
        for twin in range(1 + i % 2):
            ids = tokens(100 + 2 * i + twin, LENGTH - i % 4)
            prompt = len(ids) - 3 - i % 5
            requests[case, twin] = Request(ids, ((digest, 1.0),), prompt, chunk=4 + i % 7, start=i % 6)
    for i in range(4):
        requests["base", i] = Request(tokens(500 + i), (), LENGTH - 4, chunk=9 - 2 * i, start=2 * i)
    server.run(list(requests.values()))
    for (case, _), request in requests.items():
        oracle = base if case == "base" else base.adapters[case]
        assert_same(request, oracle.logits(request.ids), case)
    with_adapters = [torch.cat(requests["base", i].logits) for i in range(4)]
    server.run(list(requests.values()), adapters=False)
    for i in range(4):
        assert torch.equal(torch.cat(requests["base", i].logits), with_adapters[i])


def test_adapters_come_and_go(bases: dict[str, Base], servers: dict[str, Server]) -> None:
    """An adapter loaded again into other pages and another slot is the same; those beside it do not notice."""
    base, server = bases["llama"], servers["llama"]
    first, second, third = (base.adapters[case] for case in ("all seven", "rank_pattern", "only v_proj"))
    digests = [server.load(adapter.folder) for adapter in (first, second)]
    place = server.residency.slot_of(digests[0])
    server.residency.drop(digests[0])
    digests.append(server.load(third.folder))
    digests[0] = server.load(first.folder)
    assert server.residency.slot_of(digests[0]) != place
    requests = [Request(tokens(7), ((digest, 1.0),)) for digest in digests]
    server.run(requests)
    for request, adapter in zip(requests, (first, second, third), strict=True):
        assert_same(request, adapter.logits(request.ids), "reloaded")


@dataclass
class Pair:
    """Two adapters of different shape in one PEFT model, and their weighted sum made by PEFT."""

    model: Any
    folders: tuple[Path, Path]

    def logits(self, name: str, ids: list[int]) -> Tensor:
        self.model.set_adapter(name)
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float()


WEIGHTS = (0.7, 1.6)


@pytest.fixture(scope="module")
def pair(bases: dict[str, Base], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("pair")
    hf = load_oracle(bases["llama"].path)
    model = get_peft_model(hf, LoraConfig(r=4, lora_alpha=6, target_modules=QV), adapter_name="one").eval()
    model.add_adapter("two", LoraConfig(r=19, lora_alpha=9, target_modules=ALL, use_rslora=True))
    randomise_adapter(model, 5, torch.float32, 0.5)
    model.save_pretrained(root)
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "sum", combination_type="cat")
    return Pair(model, (root / "one", root / "two"))


def test_a_weighted_mix_is_pefts_weighted_sum(bases: dict[str, Base], servers: dict[str, Server], pair: Pair) -> None:
    """Also beside requests that wear the two alone, scaled, in the other order, and none."""
    server = servers["llama"]
    one, two = (server.load(folder) for folder in pair.folders)
    ids = tokens(9)
    mixed = Request(ids, ((one, WEIGHTS[0]), (two, WEIGHTS[1])), chunk=6)
    swapped = Request(ids, ((two, WEIGHTS[1]), (one, WEIGHTS[0])), start=1)
    alone = {
        name: Request(tokens(i), ((digest, 1.0),)) for i, (name, digest) in enumerate((("one", one), ("two", two)))
    }
    halves = Request(ids, ((one, WEIGHTS[0] / 2), (two, WEIGHTS[1]), (one, WEIGHTS[0] / 2)), start=2, chunk=3)
    nobody = Request(ids)
    server.run([mixed, swapped, *alone.values(), halves, nobody])
    wanted = pair.logits("sum", ids)
    for request in (mixed, swapped, halves):
        assert_same(request, wanted, "mix")
    for name, request in alone.items():
        assert_same(request, pair.logits(name, request.ids), name)
        assert float((pair.logits(name, ids) - wanted).abs().max()) > VISIBLE
    assert_same(nobody, bases["llama"].logits(ids), "base")


def test_a_wrong_adapter_would_show(bases: dict[str, Base], servers: dict[str, Server]) -> None:
    """The tolerance tells any two adapters of a base apart: a mix-up of rows cannot pass."""
    for base in bases.values():
        answers = {case: adapter.logits(tokens(3)) for case, adapter in base.adapters.items()}
        answers["base"] = base.logits(tokens(3))
        names = list(answers)
        for i, case in enumerate(names):
            for other in names[:i]:
                assert float((answers[case] - answers[other]).abs().max()) > 100 * TOLERANCE, f"{case} is {other}"


def test_a_mix_of_ia3_is_pefts_where_the_weights_are_one(
    bases: dict[str, Base], servers: dict[str, Server], tmp_path: Path
) -> None:
    """PEFT sums w * l, which is 1 + the sum of w * (l - 1) where the weights sum to one."""
    from peft import IA3Config, get_peft_model

    targets = {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": []}
    model = get_peft_model(load_oracle(bases["llama"].path), IA3Config(**targets), adapter_name="one").eval()
    model.add_adapter("two", IA3Config(**targets))
    randomise_adapter(model, 5, torch.float32, 0.5)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["one", "two"], [0.3, 0.7], "sum")
    pair = Pair(model, (tmp_path / "one", tmp_path / "two"))
    server = servers["llama"]
    one, two = (server.load(folder) for folder in pair.folders)
    mixed = Request(tokens(9), ((one, 0.3), (two, 0.7)), chunk=6)
    alone = Request(tokens(9), ((two, 1.0),))
    server.run([mixed, alone])
    assert_same(mixed, pair.logits("sum", mixed.ids), "mix")
    assert_same(alone, pair.logits("two", alone.ids), "two")
    assert float((pair.logits("two", mixed.ids) - pair.logits("sum", mixed.ids)).abs().max()) > VISIBLE


def test_ia3_mixed_with_lora_scales_the_base_alone(
    bases: dict[str, Base], servers: dict[str, Server], tmp_path: Path
) -> None:
    """Our own definition: (1 + w (l - 1)) * (W x + b) + w' * scaling * B A x; down's l counts as up's."""
    base, server = bases["llama_biased"], servers["llama_biased"]
    options: dict[str, Any] = {"target_modules": ALL, "feedforward_modules": ["down_proj"]}
    ia3 = make_peft_adapter(base.hf, tmp_path / "ia3", kind="IA3", **options)
    lora = make_peft_adapter(base.hf, tmp_path / "lora", seed=2, r=4, target_modules=ALL)
    scales: dict[str, Tensor] = {}
    for path, module in ia3.modules().items():
        name = path.replace("down_proj", "up_proj")
        scales[name] = scales.get(name, torch.ones(())) * module.ia3_l["default"].detach().flatten()
    deltas = {path: module.get_delta_weight("default").detach() for path, module in lora.modules().items()}
    w_ia3, w_lora = WEIGHTS
    hf = load_oracle(base.path)
    for path, delta in deltas.items():
        scale = 1 + w_ia3 * (scales.get(path, torch.ones(())) - 1)

        def mix(linear: Any, inputs: Any, y: Tensor, scale: Tensor = scale, delta: Tensor = delta) -> Tensor:
            return scale * y + w_lora * inputs[0] @ delta.T

        hf.get_submodule(path).register_forward_hook(mix)
    digests = [server.load(adapter.folder) for adapter in (ia3, lora)]
    mixed = Request(tokens(9), tuple(zip(digests, WEIGHTS, strict=True)), chunk=6)
    swapped = Request(tokens(9), ((digests[1], w_lora), (digests[0], w_ia3)), start=2)
    server.run([mixed, swapped])
    with torch.no_grad():
        wanted = hf(torch.tensor([tokens(9)])).logits[0].float()
    assert float((wanted - lora.logits(tokens(9))).abs().max()) > VISIBLE
    for request in (mixed, swapped):
        assert_same(request, wanted, "mix")


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Backend:
    return load_backend(request.param, "cpu")


def test_a_turn_mixed_with_lora_turns_the_base_alone(bases: dict[str, Base], tmp_path: Path, ops: Backend) -> None:
    """W (x + w (R - I) x) + b + w' * scaling * B A x, beside the two alone and rows of the base."""
    base = bases["llama_biased"]
    server = Server(base.path, ops=ops)
    oft = make_peft_adapter(base.hf, tmp_path / "oft", kind="OFT", target_modules=ALL, oft_block_size=16)
    lora = make_peft_adapter(base.hf, tmp_path / "lora", seed=2, r=4, target_modules=ALL)
    turned = oft.modules()
    w_oft, w_lora = WEIGHTS
    hf = load_oracle(base.path)
    for path, module in lora.modules().items():
        delta = module.get_delta_weight("default").detach()

        def mix(_: Any, inputs: Any, y: Tensor, path: str = path, delta: Tensor = delta) -> Tensor:
            return y + w_oft * (turned[path](inputs[0]) - y) + w_lora * inputs[0] @ delta.T

        hf.get_submodule(path).register_forward_hook(mix)
    digests = [server.load(adapter.folder) for adapter in (oft, lora)]
    mixed = Request(tokens(9), tuple(zip(digests, WEIGHTS, strict=True)), chunk=6)
    swapped = Request(tokens(9), ((digests[1], w_lora), (digests[0], w_oft)), start=2)
    alone = [Request(tokens(8), ((digest, 1.0),), chunk=7) for digest in digests]
    nobody = Request(tokens(7))
    server.run([mixed, swapped, *alone, nobody])
    with torch.no_grad():
        wanted = hf(torch.tensor([tokens(9)])).logits[0].float()
    assert float((wanted - lora.logits(tokens(9))).abs().max()) > VISIBLE
    for request in (mixed, swapped):
        assert_same(request, wanted, "mix")
    for adapter, request in zip((oft, lora), alone, strict=True):
        assert_same(request, adapter.logits(request.ids), "alone")
    assert_same(nobody, base.logits(nobody.ids), "base")


@pytest.mark.parametrize("kind", ["OFT", "BOFT"])
def test_a_quantised_base_is_turned_as_it_computes(
    bases: dict[str, Base], tmp_path: Path, ops: Backend, kind: str
) -> None:
    """The oracle has the weights that the codes stand for."""
    path = bases["llama"].path
    checkpoint = QuantizingCheckpoint(open_checkpoint(path), "int8")
    hf = load_oracle(path)
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            stored = checkpoint.read(name)
            weight.copy_(dequantize(stored) if isinstance(stored, QuantizedWeight) else stored)
    sizes = {"OFT": {"oft_block_size": 8}, "BOFT": {"boft_block_size": 8}}[kind]
    adapter = make_peft_adapter(hf, tmp_path, kind=kind, target_modules=ALL, **sizes)
    server = Server(path, ops=ops, checkpoint=checkpoint, activations=Activations.EXACT)
    request = Request(tokens(3), ((server.load(adapter.folder), 1.0),), chunk=5)
    nobody = Request(tokens(4))
    server.run([request, nobody])
    assert_same(request, adapter.logits(request.ids), kind)
    with torch.no_grad():
        assert_same(nobody, hf(torch.tensor([nobody.ids])).logits[0].float(), "base")
