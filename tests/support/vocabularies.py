"""Tokenizers on disk of other kinds than tiny.make_tiny_tokenizer's byte-level one."""

from __future__ import annotations

import json
from pathlib import Path


def make_byte_fallback_tokenizer(path: Path) -> Path:
    """A Llama-2-style tokenizer: ▁ for spaces, <0xHH> for bytes outside of the vocabulary; ids < 272."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "h", "e", "l", "o", "w", "▁h", "el", "ll", "he", "▁he", "▁hel"]
    merges = [("▁", "h"), ("e", "l"), ("l", "l"), ("▁h", "e"), ("▁he", "l")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path.mkdir(parents=True, exist_ok=True)
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return path
