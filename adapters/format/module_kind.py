"""Kinds that come to a part for each module, or one for each of its windows, computed when the adapter is loaded.

A kind says which tensors of which shapes it wants of a module and how many ranks they come to, and then makes the part
of them. What is the same for all such kinds is here: each tensor the config asks for is there and no other, in its
shape; values are finite; one module's part is made at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.config import unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, AdapterModule, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.modules import (
    FoundModule,
    LeafNames,
    last_names,
    match_tensors,
    wrong_shape,
)
from loraplex.adapters.format.targets import PATTERN_SECONDS, find_targets
from loraplex.adapters.format.trained_biases import BIAS, bias_parts, bias_shapes, take_biases
from loraplex.adapters.format.trained_biases import LEAVES as BIAS_LEAVES
from loraplex.adapters.format.values import cancels, check_finite, check_rounded, no_effect
from loraplex.adapters.format.wanted import Shapes, Wanted, check_complete, check_dense, check_shape, check_type
from loraplex.adapters.image.tiles import (
    BaseLayout,
    BiasDelta,
    Bottleneck,
    DenseDelta,
    InputTurn,
    LowRank,
    OutputScale,
    OwnRows,
    Part,
)
from loraplex.kernels.records import Projection

C = TypeVar("C", bound=AdapterConfig)

PEFT_ORDER = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
"""Of a layer's linears as transformers' models declare them, which PEFT counts modules by."""


@dataclass(frozen=True)
class Making(Generic[C]):
    """One module whose part is to be made."""

    config: C
    module: AdapterModule
    tensors: Mapping[str, Tensor]  # by the last part of their names, as in the file
    shared: Mapping[str, Tensor]
    index: int  # among the adapter's modules, as PEFT counts them
    count: int  # of modules
    base: ServedBase

    def floats(self, leaf: str) -> Tensor:
        """Return the module's tensor in fp32."""
        return self.tensors[leaf].float()

    def low_rank(self, a: Tensor, b: Tensor) -> LowRank:
        """Make the part of a [rank, in] and b [out, rank], fp32."""
        return LowRank(self.module.layer, self.module.projection, a, b, 1.0)

    def dense(self, delta: Tensor) -> DenseDelta:
        """Make the part of a change of the weight, [out, in] fp32."""
        return DenseDelta(self.module.layer, self.module.projection, delta)

    def weight(self) -> Tensor:
        """Read the base's weight [out, in] fp32. Raises AdapterRefused("unsupported_option") where it is quantised."""
        weight = self.base.weight(self.module.layer, self.module.projection.name)
        if weight is None:
            raise unsupported(
                "the change that such an adapter makes has to be computed from the base's weights, and this base is "
                "quantised; serve its original"
            )
        return weight


def is_dense(projection: Projection, ranks: int) -> bool:
    """Whether the change of a projection takes less as it is than as A and B of so many ranks."""
    width, out = projection.in_features, projection.out_features
    return width * out < ranks * (width + out)


class ModuleKind(AdapterKind[C]):
    """A kind that comes to one part for each module."""

    label: ClassVar[str]
    """Of the kind, in messages."""

    leaves: ClassVar[tuple[str, ...]]
    """The last parts of the names of a module's tensors."""

    integer_leaves: ClassVar[frozenset[str]] = frozenset()
    """Those of them that hold whole numbers."""

    @abstractmethod
    def wanted(self, config: C, module: FoundModule, match: Matcher) -> Wanted:
        """Say what tensors a targeted module has. Raises AdapterRefused: "bad_config", "too_large"."""

    @abstractmethod
    def make(self, making: Making[C]) -> Part | Sequence[Part]:
        """Make a module's part, or those of its windows. Raises AdapterRefused for values that cannot be."""

    def shared_role(self, name: str) -> str | None:
        """Say what all modules share under "base_model.<name>"; None: nothing."""
        return None

    def shared_shapes(self, config: C, modules: Sequence[FoundModule]) -> Shapes:
        """Say which shared tensors, by role, the adapter of these targeted modules has."""
        return {}

    def share(
        self, config: C, modules: Sequence[AdapterModule], found: Mapping[str, Tensor], base: ServedBase
    ) -> Mapping[str, Tensor]:
        """Make what all modules share out of the file's shared tensors. modules: as PEFT counts them."""
        return found

    def making_bytes(self, config: C, modules: Sequence[AdapterModule]) -> int:
        """Bound what one module's part takes while it is made, and what is shared: A, B and what they are made of.

        A module without ranks may come to a dense change; of such a one three are in memory at once.
        """

        def elements(projection: Projection, rank: int) -> int:
            width, out = projection.in_features, projection.out_features
            return rank * (width + out) if rank else width * out

        return max(12 * elements(module.projection, module.rank) for module in modules) + 1

    @cached_property
    def _names(self) -> LeafNames:
        known = frozenset(self.leaves)
        return LeafNames(
            role=lambda leaf: leaf if leaf in known else BIAS if leaf in BIAS_LEAVES else None,
            expected=" or ".join(self.leaves),
            label=self.label,
            foreign={"modules_to_save": "modules_to_save"},
            shared=self.shared_role,
        )

    def plan(self, config: C, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle) -> ModuleMap:
        found = match_tensors(header, base.layout, self._names)
        match = Matcher(PATTERN_SECONDS, throttle)
        paths = find_targets(config.targets, found.by_path, found.outside, match)
        wanted = {path: self.wanted(config, found.by_path[path], match) for path in paths}
        targeted = [found.by_path[path] for path in paths]
        biases = take_biases(found, header, config, wanted.keys(), base)
        shared = self.shared_shapes(config, targeted)
        check_complete(found, wanted, shared)
        for path, module in found.by_path.items():
            for leaf, name in module.tensors.items():
                check_type(name, header[name], is_integer=leaf in self.integer_leaves)
                check_shape(name, header[name], wanted[path].shapes[leaf], module, config, base.layout)
        for role, name in found.shared.items():
            check_type(name, header[name], is_integer=role in self.integer_leaves)
            if header[name].shape != shared[role]:
                hint = "; the config's numbers and the shapes of the targeted modules say so"
                raise wrong_shape(name, header[name].shape, shared[role], base.layout, hint)
        modules = tuple(
            AdapterModule(module.layer, module.projection, module.tensors, want.rank, want.scaling, want.windows)
            for module, want in zip(targeted, wanted.values(), strict=True)
        )
        shapes = tuple(
            shape for module, want in zip(targeted, wanted.values(), strict=True) for shape in want.part_shapes(module)
        )
        check_dense(shapes, base.layout)
        return ModuleMap(
            config=config,
            header=header,
            modules=(*modules, *biases),
            shapes=(*shapes, *bias_shapes(biases)),
            rank=max(module.rank for module in modules),
            targets=last_names(targeted, base.layout),
            shared=found.shared,
            making_bytes=self.making_bytes(config, modules),
        )

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> Iterator[Part]:
        check_finite({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}, throttle)
        config: C = module_map.config  # type: ignore[assignment]  # plan() was given it
        biases = [module for module in module_map.modules if module.tensors.keys() == {BIAS}]
        modules = sorted((m for m in module_map.modules if m.tensors.keys() != {BIAS}), key=_peft_order)
        found = {role: tensors[name] for role, name in module_map.shared.items()}
        shared = self.share(config, modules, found, base)
        places = {(s.layer, s.projection.name) for s in module_map.shapes[: len(module_map.shapes) - len(biases)]}
        effective = idle = False
        for bias in bias_parts(biases, tensors, base):
            effective = True
            yield bias
        for index, module in enumerate(modules):
            throttle()
            if (module.layer, module.projection.name) not in places:
                continue
            own = {leaf: tensors[name] for leaf, name in module.tensors.items()}
            made = self.make(Making(config, module, own, shared, index, len(modules), base))
            for part in made if isinstance(made, Sequence) else (made,):
                if _is_idle(part, next(iter(module.tensors.values()), ""), base.layout):
                    idle = True
                    continue
                effective = effective or not isinstance(part, LowRank) or not cancels(part)
                yield part
        if not effective:
            why = f"{', '.join(self.leaves)} come to zero" if idle else "what they come to cancels out to zero"
            raise no_effect([why])


def _peft_order(module: AdapterModule) -> tuple[int, int]:
    return module.layer, PEFT_ORDER.index(module.projection.name.rpartition(".")[2])


def _is_idle(part: Part, name: str, layout: BaseLayout) -> bool:
    """Whether nothing is left of a part in the compute dtype. Refuses values beyond that dtype by the tensor `name`."""
    match part:
        case LowRank():
            factors = (("the A it comes to", part.a), ("the B it comes to", part.b))
            left = [check_rounded(exact, name, what, layout) for what, exact in factors]
        case BiasDelta():
            left = [check_rounded(part.delta, name, "it", layout)]
        case DenseDelta():
            left = [check_rounded(part.delta, name, "the change it comes to", layout)]
        case Bottleneck():
            left = [True]
        case OutputScale():
            left = [bool((part.values != 1).any())]
        case OwnRows():
            left = [True]
        case InputTurn():
            left = [check_rounded(part.blocks, name, "the turn it comes to", layout)]
    return not all(left)
