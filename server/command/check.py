"""`loraplex adapters check`: the receipt of an adapter without a server, and what it comes to."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from loraplex.adapters.errors import AdapterError, AdapterRefused
from loraplex.server.command.build import EngineParts, build_engine
from loraplex.server.command.load import read_config, read_defaults, read_tokenizers
from loraplex.server.command.proving import make_prover
from loraplex.server.config_engine import EngineConfig
from loraplex.server.proof.receipt import Receipt

SECONDS = 3600.0
"""That a check may take: a large base is read whole."""


class Verdict(IntEnum):
    """Exit codes; 2 is the command's that cannot be run as it was given."""

    sound = 0
    refused = 1
    doubtful = 3  # it would be served, and its answers are not what they should be, or were not probed


@dataclass(frozen=True)
class Checked:
    """What a check came to."""

    outcome: Verdict
    receipt: Receipt | None = None
    code: str | None = None  # of the refusal
    message: str | None = None

    def as_json(self) -> str:
        """Write all of it as one JSON object."""
        found: dict[str, Any] = {"outcome": self.outcome.name, "code": self.code, "message": self.message}
        found["digest"] = None if self.receipt is None else self.receipt.digest
        found["receipt"] = None if self.receipt is None else self.receipt.as_json()
        return json.dumps(found, indent=2)

    def as_text(self) -> str:
        """Write it in lines for people."""
        if self.receipt is None:
            return f"refused ({self.code}): {self.message}"
        return "\n".join((*describe(self.receipt), f"{self.outcome.name}{f': {self.message}' if self.message else ''}"))


def check_adapter(path: Path, base: str, folder: Path, config: EngineConfig, *, allow_noop: bool) -> Checked:
    """Load the base in `folder`, which is called `base`, and prove the adapter at `path` on it.

    Raises what build_engine raises, StartError, and AdapterError where no receipt can be made.
    """
    model_config, defaults = read_config(folder), read_defaults(folder)
    tokenizers = read_tokenizers(folder, model_config.vocab_size, defaults.eos_token_ids)
    try:
        parts = build_engine(
            config,
            folder,
            base,
            model_config=model_config,
            check_tokenizer=tokenizers.check,
            allow_noop=allow_noop,
        )
    finally:
        tokenizers.close()
    parts.engine.start()
    try:
        return asyncio.run(_check(parts, str(path), (base, str(folder))))
    finally:
        parts.engine.stop()
        parts.adapters.close()


async def _check(parts: EngineParts, source: str, names: tuple[str, ...]) -> Checked:
    prover = make_prover(parts, names, rest=0.0)
    try:
        version = await parts.adapters.register("adapter", source)
        receipt = await prover.wait(version, SECONDS)
    except AdapterRefused as error:
        return Checked(Verdict.refused, code=error.code, message=str(error))
    except AdapterError as error:
        return Checked(Verdict.refused, code="not_found", message=str(error))
    finally:
        prover.close()
    if receipt is None:
        raise AdapterError(prover.failure(version) or f"it took longer than {SECONDS:g} s")
    doubt = receipt.doubt
    return Checked(Verdict.doubtful if doubt else Verdict.sound, receipt, message=doubt)


def describe(receipt: Receipt) -> list[str]:
    """Tell a receipt in lines."""
    found, probe = receipt.measured, receipt.probe
    rank = f" of rank {found.rank}" if found.rank else ""
    lines = [
        f"{found.kind}{rank}, {found.modules} modules, {found.tensors} tensors matched, {len(found.ignored)} ignored",
        f"digest    {found.digest}",
        f"base      {receipt.base.digest} ({receipt.base.formats})",
        f"type      {', '.join(found.dtypes)} in the file, {found.dtype} here: {found.rounding:.2g} of it rounded off",
        f"effect    {found.relative:.3g} of the base's weights",
    ]
    lines += [
        f"          {site.relative:.3g} on {'+'.join(site.projections)}, {site.largest:.3g} in layer {site.layer}"
        for site in found.sites
    ]
    if probe is not None:
        lines.append(f"probe     {probe.adapter:.2g} from the plain reference at most, the base {probe.base:.2g}")
    if receipt.remark:
        lines.append(f"remark    {receipt.remark}")
    return [*lines, f"receipt   {receipt.digest}"]
