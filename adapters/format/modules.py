"""Find the module that each tensor of an adapter's file belongs to, and refuse by name what belongs to none.

base_model.model.<layers>.N.<projection>.<leaf>      <leaf> is the kind's: "lora_A.weight", "ia3_l"
base_model.<shared>                                  what all modules share: "vera_A"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.kernels.records import Projection

SHARED_PREFIX = "base_model."
PREFIX = "base_model.model."

_LAYERS = (
    "model.layers.",
    "model.language_model.layers.",  # the text part of a multimodal model
    "language_model.model.layers.",  # the same, as older transformers named it
    "language_model.layers.",  # and these two as AutoModel has them, without a head (task FEATURE_EXTRACTION)
    "layers.",
)
_COMPILED = "_orig_mod."
"""What torch.compile() puts into the names of what it has wrapped; nothing else is called so."""

LEAF_PARTS = 3
"""Dotted parts of a leaf, at most: "lora_A.<adapter>.weight". A stranger's name of 8,192 dots is not cut at each: 1 MiB
of such names took 0.9 s."""

_FOREIGN = {"lm_head": "an adapted or resized lm_head", "embed_tokens": "an adapted or resized embed_tokens"}


@dataclass(frozen=True)
class LeafNames:
    """How a kind names the tensors of a module."""

    role: Callable[[str], str | None]  # the part of a name behind the module's path -> what the tensor is there
    expected: str  # in messages: "lora_A.weight, lora_B.weight or a bias"
    label: str  # of the kind, in messages: "LoRA"
    foreign: Mapping[str, str]  # part of a tensor's name -> the option that it belongs to
    shared: Callable[[str], str | None] = lambda _: None  # a name behind SHARED_PREFIX -> what all modules share


@dataclass
class FoundModule:
    """What the file has for one projection of one layer."""

    layer: int
    projection: Projection
    path: str  # as PEFT's patterns see it
    tensors: dict[str, str] = field(default_factory=dict)  # role -> name in the file


@dataclass(frozen=True)
class FoundModules:
    """All modules of the base, each with the tensors that the file has for it."""

    label: str
    prefix: str  # how the file names the path to the layers: "model.layers."
    by_path: Mapping[str, FoundModule]  # in the base's order
    shared: Mapping[str, str] = field(default_factory=dict)  # role -> name in the file

    @property
    def outside(self) -> tuple[str, ...]:
        """The paths of the embedding table and the head, where they are not among the modules."""
        return tuple(path for path in (embed_path(self.prefix), "lm_head") if path not in self.by_path)

    @property
    def present(self) -> list[FoundModule]:
        """The modules that the file has tensors for."""
        return [module for module in self.by_path.values() if module.tensors]

    def missing(self, module: FoundModule, leaf: str, hint: str = "") -> AdapterRefused:
        """Make the refusal of a file without a tensor that the config asks for."""
        deepest = max((other.layer for other in self.present), default=None)
        if deepest is None:
            hint = f"; the file holds no {self.label} tensor at all"
        elif deepest < module.layer:
            hint = f"; the file ends at layer {deepest}: it looks cut short, or made for a base of fewer layers"
        name = f"{PREFIX}{module.path}.{leaf}"
        return AdapterRefused("missing_tensor", f"{name} is missing, which adapter_config.json asks for{hint}")


def last_names(modules: Iterable[FoundModule], layout: BaseLayout) -> tuple[str, ...]:
    """The last names of the modules' projections, each once, in the base's order: "q_proj", ..."""
    names = {module.projection.name for module in modules}
    return tuple(p.name.rpartition(".")[2] for p in layout.projections if p.name in names)


def embed_path(prefix: str) -> str:
    """Return the path of the embedding where `prefix` is that of the layers."""
    return f"{prefix.removesuffix('layers.')}embed_tokens"


def match_tensors(
    names: Iterable[str],
    layout: BaseLayout,
    leaves: LeafNames,
    tables: Callable[[str], Iterable[FoundModule]] = lambda embed_path: (),
) -> FoundModules:
    """Give each tensor of the file to its module. Raises AdapterRefused: "unmatched_tensor", "unsupported_option".

    tables: makes the modules behind the layers', given the embedding's path.
    """
    plain = {name: name.replace(_COMPILED, "") for name in sorted(names)}
    prefix = next((p for p in _LAYERS if any(name.startswith(PREFIX + p) for name in plain.values())), _LAYERS[0])
    modules = {
        module.path: module
        for layer in range(layout.num_layers)
        for projection in layout.projections
        for module in [FoundModule(layer, projection, f"{prefix}{layer}.{projection.name}")]
    }
    modules |= {module.path: module for module in tables(embed_path(prefix))}
    shared: dict[str, str] = {}
    for name, known in plain.items():
        role = leaves.shared(known.removeprefix(SHARED_PREFIX)) if known.startswith(SHARED_PREFIX) else None
        if role is not None:
            _note(role, name, shared)
            continue
        path = known.removeprefix(PREFIX) if known.startswith(PREFIX) else ""
        module, role = next(((modules[p], leaves.role(leaf)) for p, leaf in _cuts(path) if p in modules), (None, None))
        if module is None or role is None:
            raise _unmatched(name, prefix, layout, leaves)
        _note(role, name, module.tensors)
    return FoundModules(leaves.label, prefix, modules, shared)


def wrong_shape(
    name: str, found: tuple[int, ...], expected: tuple[int, ...], layout: BaseLayout, hint: str
) -> AdapterRefused:
    """Make the refusal of a tensor whose shape does not fit the base; `hint` says what the shape suggests."""
    return AdapterRefused(
        "shape_mismatch",
        f"{name} has shape {list(found)}, expected {list(expected)} for base {layout.base_name!r}{hint}",
    )


def likely_base(projection: Projection, *, is_input: bool, width: int, base_model: str | None) -> str:
    """Say what base an adapter was made for whose tensor is `width` long on a projection's input or output side."""
    named = f" (its config names {base_model!r})" if base_model else ""
    if is_input == projection.reads_hidden:
        return f"; the adapter looks made for a base of hidden size {width}{named}"
    return f"; the adapter looks made for another base{named}"


def _note(role: str, name: str, tensors: dict[str, str]) -> None:
    if role in tensors:
        raise AdapterRefused(
            "unmatched_tensor", f"{name} and {tensors[role]} are the same thing twice; expected one adapter"
        )
    tensors[role] = name


def _cuts(path: str) -> Iterator[tuple[str, str]]:
    """Cut a name at a dot in each way that leaves a leaf of LEAF_PARTS at most, from its end."""
    at = len(path)
    for _ in range(LEAF_PARTS):
        at = path.rfind(".", 0, at)
        if at < 0:
            return
        yield path[:at], path[at + 1 :]


def _unmatched(name: str, prefix: str, layout: BaseLayout, leaves: LeafNames) -> AdapterRefused:
    for part, owner in {**_FOREIGN, **leaves.foreign}.items():
        if part in name:
            return AdapterRefused("unsupported_option", f"{name} belongs to {owner}, which is not supported")
    plain = name.replace(_COMPILED, "")
    layer = re.match(r"([0-9]{1,9})\.", plain.removeprefix(PREFIX + prefix))
    if not plain.startswith(PREFIX + prefix) or layer is None:
        expected = " or ".join(f"{PREFIX}{p}N." for p in _LAYERS)
        why = f"expected names that begin with {expected} (one of them in all of the file)"
    elif int(layer[1]) >= layout.num_layers:
        why = f"the base has {layout.num_layers} layers; the adapter looks made for one of {int(layer[1]) + 1} or more"
    else:
        projections = ", ".join(projection.name for projection in layout.projections)
        why = f"expected {leaves.expected} of {projections}"
    return AdapterRefused("unmatched_tensor", f"{name} matches nothing in base {layout.base_name!r}: {why}")
