"""Read config.json as transformers understands it: old styles under today's names, what is left out filled in.

transformers loads most of torch to do this: 3 s, and 170 MiB that a server would keep for as long as it runs. So it is
asked in a process of its own, from which torch is hidden (0.9 s), unless this process has it loaded already.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

FIELDS = (
    *("attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "head_dim", "hidden_act"),
    *("hidden_activation", "hidden_size", "intermediate_size", "layer_types", "max_position_embeddings", "mlp_bias"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "query_pre_attn_scalar", "rms_norm_eps"),
    *("rope_parameters", "sliding_window", "tie_word_embeddings", "use_bidirectional_attention", "vocab_size"),
)
"""What is asked for; a family without a field has no such key in the answer."""

_SCRIPT = "import sys; sys.modules['torch'] = None; from loraplex.server.models.normalise import main; main()"


def normalise(raw: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return FIELDS of the transformers config of type `model_type` that `raw` describes.

    Raises ValueError, and here also what else transformers raises, for a `raw` that describes none.
    """
    if "transformers" in sys.modules:
        return _ask_transformers(raw, model_type)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([raw, model_type]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"transformers could not be asked: {told[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def main() -> None:
    """Read [raw, model_type] from stdin; write normalise()'s answer or {"error": ...} to stdout."""
    raw, model_type = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = _ask_transformers(raw, model_type)
    except Exception as error:  # of a dozen types
        answer = {"error": " ".join(str(error).split())}
    json.dump(answer, sys.stdout)


def _ask_transformers(raw: dict[str, Any], model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    raw = {**raw, "model_type": model_type}  # the architecture decides; derivatives invent types of their own
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, dict) and "su" in (scaling.get("type"), scaling.get("rope_type")):
        # longrope's first name; transformers translates it only after asking for a field it had yet to fill in
        raw["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    config = CONFIG_MAPPING[model_type].from_dict(raw)
    return {name: getattr(config, name) for name in FIELDS if hasattr(config, name)}
