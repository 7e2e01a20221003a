"""Several adapters made one, in files: the merging strategies that LoRAX offers beyond the linear one.

They work on the factors, A with A and B with B, as LoRAX and PEFT do, so the ranks have to agree; each factor is merged
with the weights as they are given, as LoRAX does (PEFT's add_weighted_adapter takes their roots). Of the factors
T_1 .. T_n of one module, with weights w and a density d:

    ties         t_i = T_i's d * size values of largest magnitude, the others 0
                 s = sign(sum_i t_i), or of sum_i sign(t_i); where that is 0, +1
                 sum_i [sign(t_i) = s] w_i t_i / max(1, number of i with sign(t_i) = s)
    dare_linear  t_i = T_i / d with probability d, else 0;  sum_i w_i t_i
    dare_ties    t_i as in dare_linear, then as in ties

These are the formulas of PEFT's merge_utils. Each adapter's own scaling is folded into its B first, where LoRAX takes
the first one's for all. What is random is drawn from a seed made of the outcome's key: the same merge has the same
bytes wherever it is made. A module that only some of the adapters have is merged from those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused, AdapterUnavailable
from loraplex.adapters.files.beneath import roots_of
from loraplex.adapters.format.adapter_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterBytes,
    read_bytes,
)
from loraplex.adapters.format.header import parse_header, view_tensors
from loraplex.adapters.format.kinds import parse_config
from loraplex.adapters.format.lora_config import LoraConfig, plan_modules
from loraplex.adapters.format.outside import OwnConfig
from loraplex.adapters.sources.merge_plan import MergePlan
from loraplex.adapters.sources.sources import find_folder
from loraplex.adapters.version import AdapterVersion

_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")

Factors = dict[str, dict[str, Tensor]]
"""Of one adapter: module path -> "A" [r, in] and "B" [out, r], fp32, the scaling in B."""


@dataclass(frozen=True)
class _Seed:
    key: str

    def generator(self, path: str, factor: str) -> torch.Generator:
        drawn = hashlib.sha256(f"{self.key}\n{path}\n{factor}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(drawn[:8], "big") >> 1)


def merge_versions(
    versions: Sequence[AdapterVersion], plan: MergePlan, root: Path, locate: Callable[[str], Path] = find_folder
) -> str:
    """Merge the files of `versions` into the folder `root`/key, an adapter as PEFT saves them, and return the key.

    `locate`: the folder of a source. The new folder appears whole or not at all; one that is there already stays.
    Raises AdapterNotFound, and AdapterRefused: "changed" (the files are other ones by now), "unsupported_option" (for
    biases), "shape_mismatch" (ranks or sizes that differ), and what refuses a file; AdapterUnavailable where there is
    no room for it.
    """
    read = [_read(version, locate(version.source)) for version in versions]
    key = plan.key([files.digest for files in read])
    target = root / key
    if target.is_dir():
        return key
    factors = [_factors(files, version.name) for files, version in zip(read, versions, strict=True)]
    names = [version.name for version in versions]
    merged = {
        path: {factor: _merge_factor(path, factor, factors, names, plan, key) for factor in "AB"}
        for path in sorted({path for each in factors for path in each})
    }
    try:
        _write(merged, target)
    except (OSError, SafetensorError) as error:
        told = error.strerror if isinstance(error, OSError) else "it cannot be written"
        raise AdapterUnavailable(f"the merged adapter cannot be kept on the server's disk: {told}") from error
    return key


def merge_tensors(tensors: Sequence[Tensor], weights: Sequence[float], plan: MergePlan, rng: torch.Generator) -> Tensor:
    """Merge one factor of one module. `tensors` of one shape, fp32; `weights`, one each, are instead of the plan's."""
    if plan.strategy == "ties":
        sparse = [_largest(tensor, plan.density) for tensor in tensors]
    else:
        sparse = [_drawn(tensor, plan.density, rng) for tensor in tensors]
    stacked = torch.stack(sparse)
    weighted = stacked * torch.tensor(list(weights)).view(-1, *(1,) * tensors[0].dim())
    if plan.strategy == "dare_linear":
        return weighted.sum(0)
    signs = stacked.sign()
    elected = torch.where((stacked if plan.sign_method == "total" else signs).sum(0) >= 0, 1, -1)
    agree = signs == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros(tensor.numel())
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def _drawn(tensor: Tensor, density: float, rng: torch.Generator) -> Tensor:
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=rng) / density


def _merge_factor(
    path: str, factor: str, adapters: Sequence[Factors], names: Sequence[str], plan: MergePlan, key: str
) -> Tensor:
    having = [i for i, factors in enumerate(adapters) if path in factors]
    tensors = [adapters[i][path][factor] for i in having]
    if len({tensor.shape for tensor in tensors}) > 1:
        found = ", ".join(f"{list(tensor.shape)} in {names[i]!r}" for i, tensor in zip(having, tensors, strict=True))
        raise AdapterRefused(
            "shape_mismatch",
            f"{path}.lora_{factor} is {found}; merging by {plan.strategy} needs adapters of equal ranks. Others can be "
            "combined exactly by merge_strategy 'linear'",
        )
    return merge_tensors(tensors, [plan.weights[i] for i in having], plan, _Seed(key).generator(path, factor))


def _read(version: AdapterVersion, folder: Path) -> AdapterBytes:
    files = read_bytes(folder, lambda: None, roots=roots_of(version.source))
    if version.digest is not None and version.digest != version.info.tokenizer.mark(files.digest):
        raise AdapterRefused(
            "changed", f"the files of adapter {version.name!r} have changed since it was loaded; load it again"
        )
    return files


def _factors(files: AdapterBytes, name: str) -> Factors:
    """List all of an adapter's A and B."""
    config = parse_config(files.head.config)
    if not isinstance(config, LoraConfig):
        raise AdapterRefused(
            "unsupported_kind",
            f"adapter {name!r} is of kind {config.kind!r}, which has no A and B to merge by; only merge_strategy "
            "'linear' combines such adapters",
        )
    if config.own != OwnConfig(ties=config.own.ties):
        raise AdapterRefused(
            "unsupported_option",
            f"adapter {name!r} has rows of its own in place of the base's (modules_to_save, trainable_token_indices), "
            "which do not mix with other adapters",
        )
    if not config.factors_alone:
        raise AdapterRefused(
            "unsupported_option",
            f"adapter {name!r} adds more or other than the A and B of its file, which therefore cannot be merged by "
            "themselves; only merge_strategy 'linear' combines such adapters",
        )
    found: dict[str, dict[str, Tensor]] = {}
    for tensor_name, tensor in view_tensors(files.data, parse_header(files.head)).items():
        match = _FACTOR.fullmatch(tensor_name)
        if match is None:
            raise AdapterRefused(
                "unsupported_option",
                f"adapter {name!r} has {tensor_name}, which has no place in a merge by its A and B; only "
                "merge_strategy 'linear' combines such adapters",
            )
        found.setdefault(match["path"], {})[match["factor"]] = tensor.float()
    plans = plan_modules(config, found, ())
    for path, factors in found.items():
        if path not in plans or factors.keys() != {"A", "B"}:
            raise AdapterRefused("missing_tensor", f"adapter {name!r}: {path} lacks A or B, or is no target")
        factors["B"] = factors["B"] * plans[path].scaling
    return found


def _write(merged: Mapping[str, Mapping[str, Tensor]], target: Path) -> None:
    from safetensors.torch import save_file

    ranks = {path: factors["A"].shape[0] for path, factors in merged.items()}
    rank = max(ranks.values())
    others = {re.escape(path): own for path, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,  # each module's scaling is 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(merged),
        "bias": "none",
        "inference_mode": True,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        tensors = {
            f"base_model.model.{path}.lora_{factor}.weight": tensor.contiguous()
            for path, factors in merged.items()
            for factor, tensor in factors.items()
        }
        save_file(tensors, folder / WEIGHTS_FILE)
        os.replace(folder, target)
    except OSError:
        if not target.is_dir():  # else somebody made the same meanwhile
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
