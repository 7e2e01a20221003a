"""Match the tensors of a file to the base's modules outside its linears (outside.py says which there are)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.config import unsupported
from loraplex.adapters.format.header import TensorInfo
from loraplex.adapters.format.outside import BaseOutside, OwnConfig, OwnTensor
from loraplex.adapters.format.targets import PATTERN_SECONDS, find_targets
from loraplex.adapters.image.tiles import BaseLayout
from loraplex.kernels.records import OwnPlaces

MAX_ADDED = 4096
"""Rows of a table beyond the base's. Added tokens are a handful, and tables are padded to a multiple of 64 or 128; each
row is a column of the logits of a step."""

TUNED = "ln_tuning_layers.weight"
_WHOLE = frozenset({"weight", "base_layer.weight"})
_TOKENS = frozenset({"token_adapter.trainable_tokens_delta", "trainable_tokens_delta"})
_NAME = re.compile(
    r"base_model\.model\.(?:(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.|)"
    r"(?:layers\.(?P<layer>[0-9]{1,4})\.(?P<norm>(?:self_attn\.)?[a-z_]*norm)|(?P<table>embed_tokens)|norm)"
    r"|(?P<head>lm_head))\.(?P<leaf>.+)"
)


def match_own(
    config: OwnConfig, header: Mapping[str, TensorInfo], layout: BaseLayout, base: BaseOutside | None
) -> tuple[tuple[OwnTensor, ...], dict[str, TensorInfo]]:
    """Find the tensors in place of the base's rows, in order of places; and those that are left for the kind.

    Raises AdapterRefused: "unsupported_option" for other modules that the config wants saved, "missing_tensor",
    "unmatched_tensor", "shape_mismatch", "too_large".
    """
    if base is None:
        if config != OwnConfig(ties=config.ties):
            raise unsupported(f"{_wanted_key(config)} is set, which is not served beside this base")
        return (), dict(header)
    modules = _Modules(layout, base)
    wanted = modules.wanted(config)
    found: dict[str, OwnTensor] = {}
    rest = dict(header)
    trained_beside = {f"{name.partition('.lora_')[0]}.base_layer.weight" for name in header if ".lora_" in name}
    for name in sorted(header):
        match = _NAME.fullmatch(name.replace("_orig_mod.", ""))
        path = None if match is None else modules.path_of(match)
        if match is None or path is None:
            continue
        tensor = modules.tensor(name, match["leaf"], path, header[name], config, wanted)
        if tensor is not None and name in trained_beside:
            tensor = replace(tensor, frozen=tensor.shape[0] == base.vocab)
        if tensor is None:
            continue
        if path in found:
            raise AdapterRefused("unmatched_tensor", f"{name} and {found[path].name} are the same thing twice")
        found[path] = tensor
        del rest[name]
    for path, key in wanted.items():
        if path not in found:
            raise AdapterRefused("missing_tensor", f"the file has no tensor of {path}, which {key} asks for")
    modules.tie(found, config)
    modules.check_added(found)
    return tuple(sorted(found.values(), key=lambda tensor: tensor.place)), rest


def _wanted_key(config: OwnConfig) -> str:
    return "modules_to_save" if config.saved else "trainable_token_indices" if config.tokens else "target_modules"


class _Modules:
    """The base's modules outside its linears, by their names in the checkpoint without ".weight"."""

    def __init__(self, layout: BaseLayout, base: BaseOutside) -> None:
        self._base = base
        self._places = places = OwnPlaces(layout.num_layers)
        self._layers = range(layout.num_layers)
        self.norms = {
            f"model.layers.{layer}.{name}": places.norm(layer, index)
            for layer in self._layers
            for index, name in enumerate(base.norms)
            if name
        }
        self.norms["model.norm"] = places.last_norm
        self.embed, self.head = "model.embed_tokens", "lm_head"
        self._known = {**self.norms, self.embed: places.embed, self.head: places.head}

    def path_of(self, match: re.Match[str]) -> str | None:
        """Return the path of the module that a tensor's name is of; None where the base has none such."""
        if match["layer"] is not None:
            path = f"model.layers.{int(match['layer'])}.{match['norm']}"
        else:
            path = self.head if match["head"] else self.embed if match["table"] else "model.norm"
        return path if path in self._known else None

    def wanted(self, config: OwnConfig) -> dict[str, str]:
        """Map the paths whose tensors have to be there to the key of the config that says so."""
        found: dict[str, str] = {}
        for name in config.saved:
            paths = [path for path in self._known if path.endswith(name)]
            if not paths:
                raise unsupported(
                    f"modules_to_save names {name!r}; norms, embed_tokens and lm_head of the base are served whole, "
                    "others are not: train them with an adapter"
                )
            found |= dict.fromkeys(paths, "modules_to_save")
        for name, ids in config.tokens:
            paths = [path for path in (self.embed, self.head) if path.endswith(name)]
            if not paths:
                raise unsupported(f"trainable_token_indices names {name!r}; expected embed_tokens or lm_head")
            if max(ids) >= self._base.vocab + MAX_ADDED:
                raise _too_many(f"trainable_token_indices names the token {max(ids)}", self._base.vocab)
            found |= dict.fromkeys(paths, "trainable_token_indices")
        if config.tuned is not None:
            match = Matcher(PATTERN_SECONDS, lambda: None)
            found |= dict.fromkeys(find_targets(config.tuned, self.norms, (), match), "target_modules")
        tied = self._base.tied and self.embed in found
        if tied and (config.ties or found[self.embed] == "trainable_token_indices"):
            found.pop(self.head, None)  # it is the embedding's
        return found

    def tensor(
        self,
        name: str,
        leaf: str,
        path: str,
        info: TensorInfo,
        config: OwnConfig,
        wanted: Mapping[str, str],
    ) -> OwnTensor | None:
        """Return the tensor as what stands in place of `path`; None: it is not such, but the kind's own affair."""
        base, place, ids = self._base, self._known[path], None
        if path in self.norms:
            if not (leaf == TUNED or (leaf == "weight" and wanted.get(path) == "modules_to_save")):
                return None
            if path not in wanted:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but the config does not target it")
            expected: tuple[int, ...] = (base.head_dim if self._places.of_heads(place) else base.hidden,)
        elif leaf in _WHOLE:
            expected = (max(base.vocab, info.shape[0] if info.shape else 0), base.hidden)
            if expected[0] > base.vocab + MAX_ADDED:
                raise _too_many(f"{name} has {expected[0]} rows", base.vocab)
        elif leaf in _TOKENS:
            tables = (path, self.embed) if base.tied else (path,)  # TRAINABLE_TOKENS saves a tied head's twice
            ids = next((ids for table in tables for end, ids in config.tokens if table.endswith(end)), None)
            if ids is None:
                raise AdapterRefused("unmatched_tensor", f"{name} is in the file, but the config names no such tokens")
            expected = (len(ids), base.hidden)
        else:
            return None
        if info.shape != expected:
            raise AdapterRefused(
                "shape_mismatch",
                f"{name} has shape {list(info.shape)}, expected {list(expected)}; the adapter looks made for another "
                "base",
            )
        return OwnTensor(name, f"{path}.weight", place, info.shape, ids)

    def tie(self, found: dict[str, OwnTensor], config: OwnConfig) -> None:
        """Have what was found for one table act on the other, where PEFT has it so."""
        if not self._base.tied:
            return
        for path, other in ((self.embed, self.head), (self.head, self.embed)):
            tensor = found.get(path)
            if tensor is None or tensor.frozen or other in found:
                continue
            saved = any(path.endswith(name) for name in config.saved)
            if config.ties or not saved:
                found[other] = OwnTensor(tensor.name, self._table(), self._known[other], tensor.shape, tensor.ids)
        for path in {self.head} & found.keys():
            found[path] = replace(found[path], base_name=self._table())

    def check_added(self, found: Mapping[str, OwnTensor]) -> None:
        """Raise AdapterRefused where tokens beyond the base's have a row in one table and none in the other."""
        added = {path: added_ids(found.get(path), self._base.vocab) for path in (self.embed, self.head)}
        if added[self.embed] != added[self.head]:
            token = min(added[self.embed] ^ added[self.head])
            absent = self.head if token in added[self.embed] else self.embed
            raise AdapterRefused(
                "missing_tensor",
                f"the token {token} is beyond the base's {self._base.vocab} and has no row of {absent} in the file; "
                "save both tables with the adapter (PEFT's save_embedding_layers=True)",
            )

    def _table(self) -> str:
        """Return the checkpoint's name of the one table of a tied base."""
        return f"{self.embed}.weight"


def added_ids(tensor: OwnTensor | None, vocab: int) -> set[int]:
    """List the ids beyond the base's that a tensor has rows for."""
    if tensor is None:
        return set()
    return {i for i in tensor.ids if i >= vocab} if tensor.ids is not None else set(range(vocab, tensor.shape[0]))


def _too_many(what: str, vocab: int) -> AdapterRefused:
    return AdapterRefused(
        "too_large", f"{what}; the base has {vocab}, and up to {MAX_ADDED} tokens beside them are served"
    )
