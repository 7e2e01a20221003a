"""An adapter's folder in the making, and all that holds for its refusal, whatever the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.format.kind import ServedBase
from loraplex.adapters.tiers.reader import AdapterReader
from tests.support.adapter_reading import ParsedAdapter, read_adapter
from tests.support.refusals import refused


@dataclass
class AdapterFolder:
    """Change `config` and `tensors`, then read it."""

    path: Path
    served: Callable[[torch.dtype], ServedBase]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.path / "adapter_model.safetensors"

    def write(self) -> None:
        self.path.mkdir(exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        safetensors.torch.save_file(self.tensors, self.weights)

    def read(self, dtype: torch.dtype = torch.float32, *, write: bool = True) -> ParsedAdapter:
        if write:
            self.write()
        return read_adapter(self.path, self.served(dtype))

    def refused(self, code: str, *patterns: str, dtype: torch.dtype = torch.float32, write: bool = True) -> str:
        """Read it and check that it is refused with `code` and a message of one line that matches the patterns.

        All but what is wrong with the values must be found without reading them.
        """
        with pytest.raises(AdapterRefused) as caught:
            self.read(dtype, write=write)
        message = str(caught.value)
        assert caught.value.code == code, message
        own = AdapterReader(self.served(dtype), 1 << 30)
        if code in ("not_finite", "no_effect"):
            assert own.examine(str(self.path)).num_pages > 0
        else:
            with refused(code, re.escape(message)):
                own.examine(str(self.path))
        assert message.startswith(f"{self.path}: ")
        assert "\n" not in message
        assert len(message) < 1200
        for pattern in patterns:
            assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
        return message
