"""LN tuning as PEFT saves it: weights of norms, in place of the base's (outside.py makes them)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format import targets
from loraplex.adapters.format.common import module_keys
from loraplex.adapters.format.config import bad_config, read_base_model, shown, unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.kind import AdapterConfig, AdapterKind, ModuleMap, ServedBase, Throttle
from loraplex.adapters.format.outside import EMBED, OwnConfig, read_ids
from loraplex.adapters.image.tiles import Part


class _Outside(AdapterKind[AdapterConfig]):
    """A kind that has nothing but rows in place of the base's."""

    label: ClassVar[str]

    def plan(
        self, config: AdapterConfig, header: Mapping[str, TensorInfo], base: ServedBase, throttle: Throttle
    ) -> ModuleMap:
        for name in header:
            raise AdapterRefused("unmatched_tensor", f"{name} is in the file, which is nothing that {self.label} has")
        return ModuleMap(config=config, header=header, modules=(), shapes=(), rank=0, targets=())

    def parts(
        self, module_map: ModuleMap, tensors: Mapping[str, Tensor], base: ServedBase, throttle: Throttle
    ) -> Iterable[Part]:
        return ()


class LnTuning(_Outside):
    """y = norm(x) with weights of its own."""

    name = "ln_tuning"
    label = "LN tuning"
    keys = module_keys(by_layer=False)

    def read(self, raw: Mapping[str, Any]) -> AdapterConfig:
        self.keys.check(raw)
        chosen = targets.read_targets(raw, by_layer=False)
        return AdapterConfig(self.name, chosen, read_base_model(raw), own=OwnConfig(tuned=chosen))


class TrainableTokens(_Outside):
    """Rows of the embedding, and of a tied head, of its own for some tokens."""

    name = "trainable_tokens"
    label = "trainable tokens"
    keys = module_keys(
        "token_indices",
        no_bearing=("init_weights",),
        unsupported={"exclude_modules": "tokens are trained in embed_tokens; leave it out"},
        by_layer=False,
    )

    def read(self, raw: Mapping[str, Any]) -> AdapterConfig:
        self.keys.check(raw)
        if not raw.get("token_indices"):
            raise bad_config("token_indices names no token; expected a list of ids")
        modules = raw.get("target_modules") or EMBED
        names = (modules,) if isinstance(modules, str) else tuple(modules)
        if any(not isinstance(name, str) or not name.endswith(EMBED) for name in names):
            raise unsupported(f"target_modules is {shown(modules)}; expected embed_tokens")
        own = OwnConfig(tokens=((EMBED, read_ids(raw["token_indices"], "token_indices")),))
        return AdapterConfig(self.name, targets.Targets(names, ()), read_base_model(raw), own=own)
