"""FourierFT and WaveFT as PEFT saves them: the change of the weight is transformed back from a few coefficients.

adapter_model.safetensors                        what it becomes
...<projection>.fourierft_spectrum [n]           s times the real part of the inverse Fourier transform: LowRank of
                                                 2 n ranks where that takes less, else DenseDelta
...<projection>.waveft_spectrum [n]              s times one step of the inverse Haar transform: DenseDelta

Which coefficients they are is drawn again from random_loc_seed, as PEFT does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraplex.adapters.files.patterns import Matcher
from loraplex.adapters.format.common import module_keys, read_common
from loraplex.adapters.format.config import (
    MAX_RANK,
    Keys,
    bad_config,
    read_count,
    read_counts,
    read_flag,
    read_number,
    read_seed,
    shown,
    unsupported,
)
from loraplex.adapters.format.kind import AdapterConfig, AdapterModule
from loraplex.adapters.format.module_kind import Making, ModuleKind
from loraplex.adapters.format.modules import FoundModule
from loraplex.adapters.format.wanted import Wanted
from loraplex.adapters.image.tiles import Part
from loraplex.kernels.constants import TileKind


def _keys(*own: str, **refused: str) -> Keys:
    return module_keys(
        *("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed", "bias", *own),
        no_bearing=("fan_in_fan_out", "init_weights"),
        unsupported=refused,
    )


@dataclass(frozen=True)
class SpectrumConfig(AdapterConfig):
    """What inference needs of a FourierFT or WaveFT adapter's config."""

    count: int  # of coefficients
    count_pattern: tuple[tuple[str, int], ...]  # (pattern, count), the first match counts
    scaling: float
    seed: int
    transformed: bool  # False: coefficients are elements of the change


class Fourierft(ModuleKind[SpectrumConfig]):
    """y += D x, D the inverse Fourier transform of n coefficients."""

    name = "fourierft"
    label = "FourierFT"
    leaves = ("fourierft_spectrum",)
    keys = _keys()
    count, scaling = 1000, 150.0
    """What an absent n_frequency and scaling are."""

    def read(self, raw: Mapping[str, Any]) -> SpectrumConfig:
        return SpectrumConfig(
            **read_common(self, raw),
            count=read_count(raw.get("n_frequency", self.count), "n_frequency"),
            count_pattern=read_counts(raw, "n_frequency_pattern"),
            scaling=read_number(raw.get("scaling", self.scaling), "scaling"),
            seed=read_seed(raw.get("random_loc_seed", 777), "random_loc_seed"),
            transformed=True,
        )

    def wanted(self, config: SpectrumConfig, module: FoundModule, match: Matcher) -> Wanted:
        count = match.first("n_frequency_pattern", config.count_pattern, module.path, config.count)
        out, width = module.projection.out_features, module.projection.in_features
        if count > out * width:
            raise bad_config(f"n_frequency is {count}, and {module.path} has {out * width} elements")
        ranks = self.ranks(count, out, width)
        return Wanted({self.leaves[0]: (count,)}, ranks, kind=TileKind.LOW_RANK if ranks else TileKind.DENSE)

    def ranks(self, count: int, out: int, width: int) -> int:
        """Count the ranks that take less than a dense change; 0: it does. Each wave is two products of waves."""
        ranks = 2 * count
        return ranks if ranks <= MAX_RANK and ranks * (out + width) < out * width else 0

    def making_bytes(self, config: SpectrumConfig, modules: Sequence[AdapterModule]) -> int:
        """The places of all elements are drawn and a complex transform is taken: 40 bytes an element."""
        elements = max(m.projection.in_features * m.projection.out_features for m in modules)
        return super().making_bytes(config, modules) + 40 * elements

    def make(self, making: Making[SpectrumConfig]) -> Part:
        places, (out, width) = _places(making, making.floats(self.leaves[0]))
        if making.module.rank:
            return _waves(making, places, out, width)
        spectrum = torch.zeros(out, width)
        spectrum[places] = making.floats(self.leaves[0])
        return making.dense(torch.fft.ifft2(spectrum).real * making.config.scaling)


class Waveft(Fourierft):
    """y += D x, D one step of the inverse Haar transform of n coefficients, or these alone."""

    name = "waveft"
    label = "WaveFT"
    leaves = ("waveft_spectrum",)
    keys = _keys(
        *("wavelet_family", "use_idwt"),
        proportional_parameters="the config does not say how many coefficients a module has; train it with false",
    )
    count, scaling = 2592, 25.0

    def read(self, raw: Mapping[str, Any]) -> SpectrumConfig:
        config = super().read(raw)
        transformed = raw.get("use_idwt") is None or read_flag(raw, "use_idwt")
        family = raw.get("wavelet_family", "db1")
        if transformed and family not in ("db1", "haar"):
            raise unsupported(f"wavelet_family is {shown(family)}; the Haar transform alone is served: 'db1'")
        return SpectrumConfig(**{**vars(config), "transformed": transformed})

    def ranks(self, count: int, out: int, width: int) -> int:
        return 0

    def make(self, making: Making[SpectrumConfig]) -> Part:
        values = making.floats(self.leaves[0])
        places, (out, width) = _places(making, values)
        scaling = making.config.scaling
        if not making.config.transformed:
            delta = torch.zeros(out, width)
            delta[places] = values * scaling
            return making.dense(delta)
        spectrum = torch.zeros(out + out % 2, width + width % 2)
        spectrum[places] = values
        (mean, across), (along, both) = (half.chunk(2, 1) for half in spectrum.chunk(2, 0))
        # The right upper quarter is of differences between rows, the left lower one of those between columns.
        low, high = _haar(mean, along, 1), _haar(across, both, 1)
        return making.dense(_haar(low, high, 0)[:out, :width].mul_(scaling))


def _places(making: Making[SpectrumConfig], values: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Draw the rows and columns of the coefficients `values`, and say the change's shape."""
    out, width = making.module.projection.out_features, making.module.projection.in_features
    generator = torch.Generator().manual_seed(making.config.seed)
    places = torch.randperm(out * width, generator=generator)[: len(values)]
    return (places // width, places % width), (out, width)


def _waves(making: Making[SpectrumConfig], places: tuple[Tensor, Tensor], out: int, width: int) -> Part:
    """cos(p + q) = cos p cos q - sin p sin q, p the angle of a wave at an output and q at an input."""

    def angles(places: Tensor, length: int) -> Tensor:
        turns = places[:, None] * torch.arange(length)[None, :] % length  # whole numbers, so that nothing is rounded
        return turns.double() * (2 * math.pi / length)

    rows, columns = angles(places[0], out), angles(places[1], width)
    values = making.floats("fourierft_spectrum").double()[:, None] * (making.config.scaling / (out * width))
    a = torch.cat((columns.cos(), columns.sin()))
    b = torch.cat((rows.cos() * values, rows.sin() * -values))
    return making.low_rank(a.float(), b.T.float())


def _haar(low: Tensor, high: Tensor, axis: int) -> Tensor:
    """Transform back along an axis: pairs of elements of their sums `low` and their differences `high`."""
    return torch.stack((low + high, low - high), axis + 1).flatten(axis, axis + 1).mul_(math.sqrt(0.5))
