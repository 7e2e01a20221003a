"""Say what a kind of adapter is: how its config and header are checked against the base, and what its tensors add.

A kind is a file beside this one (lora.py, ia3.py) and an entry in kinds.py; one whose modules each come to one part
that is computed of their tensors is a ModuleKind (module_kind.py). What all kinds share is not theirs: the
folder's bytes (adapter_files.py), the header (header.py), the config's syntax (config.py), PEFT's rules of which
modules are targeted (targets.py), which tensor belongs to which module (modules.py), checks of values (values.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from loraplex.adapters.format.config import Keys
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kept_starts import KeptStarts
from loraplex.adapters.format.outside import BaseOutside, OwnConfig, OwnTensor
from loraplex.adapters.format.targets import TABLES, Targets
from loraplex.adapters.format.windows import Window
from loraplex.adapters.front import Front
from loraplex.adapters.image.tiles import BaseLayout, Part, PartShape
from loraplex.adapters.positions import Positions
from loraplex.kernels.records import Projection

BaseBias = Callable[[int, str], Tensor | None]
"""(layer, projection name) -> the base's own bias [out], or None where it has none."""

SquaredNorms = Callable[[int, str], Tensor]
"""(layer, projection name) -> |w|^2 [out] fp32 of the rows w of the base's own weight as it computes with it."""

Products = Callable[[int, str, Tensor], Tensor]
"""(layer, projection name, a [r, in]) -> a W^T [r, out] fp32 of that weight W; a is rounded to the compute dtype."""

Weights = Callable[[int, str], Tensor | None]
"""(layer, projection name) -> its weight [out, in] fp32 as the checkpoint has it; None where that is quantised."""

Throttle = Callable[[], None]
"""Called between pieces of work; may raise, to end the work."""


@dataclass(frozen=True)
class ServedBase:
    """The base that adapters are checked against."""

    layout: BaseLayout
    bias: BaseBias
    squared_norms: SquaredNorms
    products: Products
    weight: Weights
    formats: str = ""  # of its quantised weights, as "Q4_1 + Q8_0"; "": there are none
    starts: KeptStarts | None = None  # where singular parts of weights are kept; None: they are computed each time
    outside: BaseOutside | None = None  # None: adapters that have more than linears are refused


@dataclass(frozen=True)
class AdapterConfig:
    """What every kind reads of adapter_config.json; types and ranges are checked."""

    kind: str  # AdapterKind.name
    targets: Targets
    base_model: str | None = field(compare=False)  # for messages and remarks alone
    own: OwnConfig = field(default=OwnConfig(), kw_only=True)
    bias: str = field(default="none", kw_only=True)  # of the base's biases those trained: none, all, only the targeted

    @property
    def remark(self) -> str:
        """Say what is to be known of such an adapter though it is served; "": nothing."""
        return ""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Return the tokens from whose last occurrence in a prompt on such an adapter acts; (): from the first on."""
        return ()

    @property
    def positions(self) -> Positions | None:
        """Return which of a prompt's tokens such an adapter acts on; None: no position decides that."""
        return None

    def same_shapes(self) -> AdapterConfig:
        """A config that plans parts of the same shapes: equal for adapters that differ in factors alone."""
        return self


@dataclass(frozen=True)
class AdapterModule:
    """One projection of one layer as an adapter has it."""

    layer: int
    projection: Projection
    tensors: Mapping[str, str]  # role -> name in the file; A and B are low-rank factors, other roles the kind's own
    rank: int = 0  # 0: no low-rank factors
    scaling: float = 1.0  # of the low-rank factors' product
    windows: tuple[Window, ...] = ()  # that its parts have; (): one part has all inputs and outputs

    @property
    def is_table(self) -> bool:
        """Whether it is the embedding or the head, and so of no layer."""
        return self.projection.name in TABLES


@dataclass(frozen=True)
class FactorPair:
    """A and B of one module as they lie in the file, to be packed by strips (pack_plan.py)."""

    shape: PartShape
    a: TensorInfo  # [r, in]
    b: TensorInfo  # [out, r]
    scaling: float


@dataclass(frozen=True)
class ModuleMap:
    """An adapter that is fit for the base by its config and header; any number of adapters may share one."""

    config: AdapterConfig
    header: Mapping[str, TensorInfo]
    modules: tuple[AdapterModule, ...]  # in the base's order
    shapes: tuple[PartShape, ...]  # of the parts it can come to at most
    rank: int  # the largest of its modules; 0: the kind has no rank
    targets: tuple[str, ...]  # last names of the projections it acts on: "q_proj", ...
    shared: Mapping[str, str] = field(default_factory=dict)  # role -> name in the file, of what all modules share
    front: Front | None = None  # what it puts in front of the prompt, with no modules beside it
    making_bytes: int = 0  # that computing one module's part takes, and what all share; 0: nothing is computed
    own: tuple[OwnTensor, ...] = ()  # what stands in place of the base's rows, beside the modules

    @property
    def kind(self) -> str:
        """AdapterKind.name."""
        return self.config.kind

    @property
    def outside(self) -> int:
        """Count what it has outside the layers' linears: rows in place of the base's, changes of its tables."""
        return sum(not tensor.frozen for tensor in self.own) + sum(module.is_table for module in self.modules)

    @cached_property
    def pairs(self) -> tuple[FactorPair, ...]:
        """The factors of all modules, in their order, where the adapter is nothing but A and B; else empty."""
        others = (module.windows or module.tensors.keys() != {"A", "B"} for module in self.modules)
        if self.making_bytes or self.own or any(others):
            return ()
        return tuple(
            FactorPair(shape, self.header[module.tensors["A"]], self.header[module.tensors["B"]], module.scaling)
            for module, shape in zip(self.modules, self.shapes, strict=True)
        )


C = TypeVar("C", bound=AdapterConfig)


class AdapterKind(ABC, Generic[C]):
    """One way of adapting a base: stateless."""

    name: ClassVar[str]
    """Lower case of PEFT's peft_type; what receipts say."""

    keys: ClassVar[Keys]
    """Of its config: what each means to inference."""

    integers: ClassVar[bool] = False
    """Whether some of its tensors may hold whole numbers."""

    @abstractmethod
    def read(self, raw: Mapping[str, Any]) -> C:
        """Read the config's object.

        Raises AdapterRefused: "bad_config", "unsupported_option", "too_large" (rank).
        """

    @abstractmethod
    def plan(self, config: C, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle) -> ModuleMap:
        """Check config and header against the base: every tensor is used and every module complete, or it is refused.

        Raises AdapterRefused, whose message names the tensor or option, what was found and what was expected.
        """

    @abstractmethod
    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> Iterable[Part]:
        """Make what the adapter adds out of its tensors, by their names in the file; leave out what adds nothing.

        Where module_map.making_bytes is not 0 they are made as they are asked for, so that one module's are in memory
        at a time. Raises AdapterRefused, then or before: "not_finite", and "no_effect" when nothing is left.
        """

    def front(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], layout: BaseLayout, throttle: Throttle
    ) -> Tensor:
        """Make the rows [V, W] fp32 of module_map.front out of the file's tensors.

        Raises AdapterRefused("not_finite"); ValueError where the kind puts nothing there.
        """
        raise ValueError(f"{self.name} puts nothing in front of the prompt")
