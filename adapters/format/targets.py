"""Find the modules of the base that an adapter's config targets, by PEFT's own rules.

The rules are those of peft/tuners/tuners_utils.py (check_target_module_exists), alike for every kind of adapter.
Patterns come from strangers, so they are matched within bounds (patterns.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.config import bad_config, read_names, shown, unsupported

PATTERN_SECONDS = 1.0
"""Of a core, for all patterns of one adapter over all modules of the base; sane ones take a few milliseconds."""

TABLES = ("embed_tokens", "lm_head")
"""The last names of modules outside the layers. PEFT's "all-linear" leaves the head out, and a table is not linear."""

TARGET_KEYS = frozenset({"target_modules", "exclude_modules"})
LAYER_KEYS = frozenset({"layers_to_transform", "layers_pattern"})


@dataclass(frozen=True)
class Targets:
    """What a config says about which modules are meant."""

    modules: str | tuple[str, ...]  # a pattern over whole paths, "all-linear", or names (ends of paths)
    excluded: str | tuple[str, ...]
    layers: frozenset[int] | None = None  # layers_to_transform
    layers_pattern: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()  # target_parameters: ends of parameters' paths, as "mlp.up_proj.weight"

    def has_parameter(self, path: str) -> bool:
        """Whether the weight of the module `path` is among the parameters."""
        weight = f"{path}.weight"
        return any(weight == name or weight.endswith(f".{name}") for name in self.parameters)


def read_targets(raw: Mapping[str, Any], *, by_layer: bool, parameters: tuple[str, ...] = ()) -> Targets:
    """Read the keys that choose modules; by_layer: LAYER_KEYS too. Raises AdapterRefused("bad_config").

    parameters: that are targeted beside them.
    """
    layers = _read_layers(raw) if by_layer else None
    modules = read_names(raw, "target_modules")
    if not modules and not parameters:
        raise bad_config("target_modules names no module; expected a list of names, a pattern, or 'all-linear'")
    if isinstance(modules, str) and layers is not None:
        raise bad_config(
            "layers_to_transform is set while target_modules is a pattern; PEFT wants a list of names there"
        )
    patterns = read_names(raw, "layers_pattern") if by_layer else ()
    return Targets(
        modules,
        read_names(raw, "exclude_modules"),
        layers,
        (patterns,) if isinstance(patterns, str) else patterns,
        parameters,
    )


def find_targets(targets: Targets, paths: Iterable[str], others: Iterable[str], match: Matcher) -> list[str]:
    """Find which of the modules `paths` (as PEFT sees them: "model.layers.0.self_attn.q_proj") are targeted, in order.

    `others` are modules the base has outside its layers, which the kind cannot target. Raises AdapterRefused:
    "unsupported_option" for a target among `others`; "bad_config" for a pattern that is not valid or takes too long,
    for a name in target_modules that the base does not have, and when nothing is targeted.
    """
    paths, others = tuple(paths), tuple(others)
    chosen = _Chosen(targets, match)
    for path in others:
        if chosen.has(path):
            raise unsupported(f"target_modules takes in {path}, which is not supported; train without it")
    for path in paths + others:
        if path.endswith(TABLES) and targets.has_parameter(path):
            raise unsupported(f"target_parameters takes in {path}, which is not supported; train without it")
    if not isinstance(targets.modules, str):
        known = {tail for path in paths + others for tail in _tails(path)}
        for name in targets.modules:
            if name not in known:
                raise bad_config(f"target_modules names {name!r}, which the base does not have; it has {_ends(paths)}")
    for name in targets.parameters:
        if not any(replace(targets, parameters=(name,)).has_parameter(path) for path in paths):
            raise unsupported(
                f"target_parameters has {name!r}, which is the weight of no linear layer of the base; it has "
                f"{_ends(paths)} (expert weights of a mixture are not served)"
            )
    found = [path for path in paths if chosen.has(path) or targets.has_parameter(path)]
    twice = next((path for path in found if targets.has_parameter(path) and chosen.has(path)), None)
    if twice is not None:
        raise bad_config(f"target_modules and target_parameters both take in {twice}; expected one of them")
    if not found:
        raise bad_config(f"target_modules and its kin leave no module of the base, which has {_ends(paths)}")
    return found


class _Chosen:
    """Which modules target_modules, exclude_modules and layers_to_transform leave."""

    def __init__(self, targets: Targets, match: Matcher) -> None:
        self._targets = targets
        self._match = match
        self._named = frozenset(() if isinstance(targets.modules, str) else targets.modules)
        self._unnamed = frozenset(() if isinstance(targets.excluded, str) else targets.excluded)
        self.all_linear = isinstance(targets.modules, str) and targets.modules.lower() == "all-linear"

    def has(self, path: str) -> bool:
        modules, excluded = self._targets.modules, self._targets.excluded
        if isinstance(excluded, str):
            if self._match.full("exclude_modules", excluded, path):
                return False
        elif not self._unnamed.isdisjoint(_tails(path)):
            return False
        if isinstance(modules, str):
            return (self.all_linear and not path.endswith(TABLES)) or self._match.full("target_modules", modules, path)
        if path in self._named:
            return True  # a whole path is meant as it stands: PEFT does not look at layers_to_transform then
        if self._named.isdisjoint(_tails(path)):
            return False
        return self._targets.layers is None or self._layer(path) in self._targets.layers

    def _layer(self, path: str) -> int | None:
        if not self._targets.layers_pattern:
            return self._match.index("layers_pattern", r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
        for pattern in self._targets.layers_pattern:
            layer = self._match.index("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)
            if layer is not None:
                return layer
        return None


def _read_layers(raw: Mapping[str, Any]) -> frozenset[int] | None:
    value = raw.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise bad_config(f"layers_to_transform is {shown(value)}; expected a layer's number or a list of them")
    return frozenset(layers)


def _tails(path: str) -> Iterator[str]:
    """All that a module may be named by: "model.layers.0.mlp", "layers.0.mlp", "0.mlp", "mlp"."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def _ends(paths: Iterable[str]) -> str:
    """The last parts of module paths, each once, in order: what a config may name."""
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
