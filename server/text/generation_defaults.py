"""What a base's authors say about generating: generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class GenerationConfigError(ValueError):
    """A file that is damaged; the message names it."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Hold what the checkpoint's authors say about generating; a field is None where they say nothing."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_hf(cls, path: str | Path) -> GenerationDefaults:
        """Read `path`/generation_config.json; without it (or its eos_token_id) the eos of config.json counts.

        Raises GenerationConfigError for damaged files.
        """
        folder = Path(path)
        file = folder / "generation_config.json"
        raw = _read_json(file) if file.exists() else {}
        eos = raw.get("eos_token_id")
        if eos is None:
            eos = _read_json(folder / "config.json").get("eos_token_id")
        ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if not all(isinstance(token, int) for token in ids):
            raise GenerationConfigError(f"{folder}: eos_token_id is {eos!r}, expected a number or a list of numbers")
        numbers: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            value = raw.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise GenerationConfigError(f"{file}: {name} is {value!r}, expected a number")
            numbers[name] = int(value) if name == "top_k" else float(value)
        return cls(ids, **numbers)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenerationConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise GenerationConfigError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value
