"""quantization_config of a config.json, or a part of it, read value by value."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.server.models.checkpoint import WeightsError


@dataclass(frozen=True)
class Settings:
    """Read values of one JSON object. Every method raises WeightsError naming the value."""

    values: Mapping[str, Any]
    where: str  # "folder/config.json: quantization_config"

    def error(self, name: str, expected: str) -> WeightsError:
        """Write the refusal of the value `name`."""
        return WeightsError(f"{self.where}.{name} is {json.dumps(self.values.get(name))[:200]}, expected {expected}")

    def integer(self, name: str, allowed: Iterable[int] | None = None) -> int:
        """Read a whole number: one of `allowed`, or any from 1 up."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, "a whole number")
        if allowed is not None and value not in allowed:
            raise self.error(name, " or ".join(map(str, allowed)))
        if allowed is None and value < 1:
            raise self.error(name, "a whole number from 1 up")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, allowed: Iterable[str], default: str | None = None) -> str:
        """Read one of the words `allowed`, in any case."""
        value = self.values.get(name, default)
        if value is None:
            value = default
        if not isinstance(value, str) or value.lower() not in allowed:
            raise self.error(name, " or ".join(allowed))
        return value.lower()

    def pair(self, name: str) -> tuple[int, int]:
        """Read two whole numbers from 1 up."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
            raise self.error(name, "two whole numbers from 1 up")
        return value[0], value[1]

    def part(self, name: str) -> Settings | None:
        """Read an object in the object; None where there is none."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "an object or null")
        return Settings(value, f"{self.where}.{name}")

    def refuse(self, names: Iterable[str], expected: str = "none: it changes what the weights mean") -> None:
        """Raise WeightsError where one of `names` has a value other than null, false, "" or an empty object or list."""
        for name in names:
            if self.values.get(name):
                raise self.error(name, expected)


def quantization_settings(folder: Path) -> Settings | None:
    """Read quantization_config of `folder`/config.json; None: the checkpoint is dense."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} holds a {type(config).__name__}, expected a JSON object")
    return Settings(config, str(file)).part("quantization_config")
