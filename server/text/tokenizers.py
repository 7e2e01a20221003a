"""The tokenizer of what a request wears: the base's, with what the adapters' own tokenizer files change. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken as FastToken
from tokenizers import Tokenizer as FastTokenizer

from loraplex.adapters.errors import AdapterRefused
from loraplex.adapters.files.tokenizer_files import AddedToken, TokenizerFiles
from loraplex.server.text.chat_template import ChatTemplateError
from loraplex.server.text.template_process import AdapterTemplate, TemplateProcesses
from loraplex.server.text.tokenizer import Template, Tokenizer

KEPT = 64
"""Tokenizers, of the adapters used last; making one takes 0.3 ms, 20 ms on a base with 6,400 added tokens."""

MAX_CHANGED = 1024
"""Added tokens of an adapter beside the base's. Fine-tunes add a handful."""


class TokenizersDiffer(ValueError):
    """Say how adapters that are to be worn together write a text differently."""


@dataclass(frozen=True)
class Difference:
    """Hold what an adapter's tokenizer files change."""

    template: bool = False
    eos: tuple[str, ...] = ()  # tokens that end its answers beside the base's
    special: tuple[tuple[str, str], ...] = ()  # those the base has otherwise, ("bos_token", ...) -> text
    added: tuple[AddedToken, ...] = ()  # those the base has not, or under another id

    def __str__(self) -> str:
        """Tell the difference in words, for logs; "" where nothing differs."""
        added = f"{len(self.added)} added tokens ({', '.join(token.text for token in self.added[:4])})"
        told = [
            *(["a chat template of its own"] if self.template else []),
            *([f"answers end with {' and '.join(self.eos)}"] if self.eos else []),
            *(f"{name} is {text}" for name, text in self.special if name != "eos_token"),
            *([added] if self.added else []),
        ]
        return "; ".join(told)


class Tokenizers:
    """Keep the tokenizers of one base and its adapters. `of` is the event loop's; the rest is safe from any thread."""

    def __init__(self, base: Tokenizer, rows: int, eos_ids: Sequence[int]) -> None:
        """rows: of the base's embedding, each a token it knows. eos_ids: of the base."""
        self.base = base
        self._vocabulary = base.fast.model
        self.rows = rows
        self.eos_ids = tuple(eos_ids)
        self._processes = TemplateProcesses()
        self._kept: OrderedDict[tuple[TokenizerFiles, ...], Tokenizer] = OrderedDict()

    def check(self, files: TokenizerFiles, tokens: int = 0) -> str:
        """Tell in words what `files` change. tokens: past the last id that the adapter itself has added; 0: none.

        Raises AdapterRefused: "unsupported_option" for files that need tokens which the base has no rows for,
        "too_large". A token for padding needs no row: nothing is padded here.
        """
        difference = self.difference(files)
        if (changed := len(difference.added)) > MAX_CHANGED:
            raise AdapterRefused(
                "too_large", f"its tokenizer has {changed} added tokens that the base has not, at most {MAX_CHANGED}"
            )
        rows = max(self.rows, tokens)
        padding = dict(files.special).get("pad_token")
        added = {token.text: token for token in files.added}
        for token in files.added:
            if self._id_of(token) >= rows and token.text != padding:
                raise AdapterRefused(
                    "unsupported_option",
                    f"its tokenizer has the added token {token.text[:80]!r} with the id {token.id}, and there are "
                    f"rows for the ids 0 to {rows - 1}; save the adapter with its trained tokens (PEFT's "
                    "save_embedding_layers, modules_to_save or trainable_token_indices)",
                )
        for name, text in files.special:
            if name in ("bos_token", "eos_token") and text not in added and self.base.token_id(text) is None:
                raise AdapterRefused(
                    "unsupported_option",
                    f"its tokenizer's {name} is {text[:80]!r}, which neither the base's vocabulary nor its own added "
                    "tokens have; name a token that is there in tokenizer_config.json",
                )
        if (beyond := max(files.eos_ids, default=-1)) >= rows:
            raise AdapterRefused(
                "unsupported_option",
                f"generation_config.json names the eos_token_id {beyond}, and there are the ids 0 to {rows - 1}",
            )
        return str(difference)

    def difference(self, files: TokenizerFiles) -> Difference:
        """Return what `files` change."""
        base, own = self.base, dict(files.special)
        special = {name: text for name, text in own.items() if base.special_tokens.get(name) != text}
        special.pop("pad_token", None)
        added = [t for t in files.added if base.token_id(t.text) != self._id_of(t) and t.text != own.get("pad_token")]
        ids = {token.text: token.id for token in added}
        eos: dict[int | None, str] = {i: base.token_text(i) for i in files.eos_ids}
        if (text := own.get("eos_token")) is not None:
            eos[ids.get(text, base.token_id(text))] = text
        return Difference(
            template=files.template is not None and not _same_text(files.template, base.template_source),
            eos=tuple(text for i, text in eos.items() if i is not None and i not in self.eos_ids),
            special=tuple(special.items()),
            added=tuple(added),
        )

    def of(self, worn: Sequence[TokenizerFiles]) -> Tokenizer:
        """Return the tokenizer of a request that wears adapters with these files: the base's own where nothing differs.

        Of several whose chat templates differ, the tokenizer has none. Raises TokenizersDiffer where one text is a
        token of two ids.
        """
        key = tuple(dict.fromkeys(worn))
        found = self._kept.pop(key, None) or self._make(key)
        self._kept[key] = found
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def close(self) -> None:
        """End the processes that render."""
        self._processes.close()

    def _make(self, worn: tuple[TokenizerFiles, ...]) -> Tokenizer:
        base, changes = self.base, [(files, self.difference(files)) for files in worn]
        if all(difference == Difference() for _, difference in changes):
            return base
        added: dict[str, AddedToken] = {}
        for token in (token for _, difference in changes for token in difference.added):
            other = added.setdefault(token.text, token)
            if other.id != token.id:
                raise TokenizersDiffer(f"{token.text[:80]!r} is the token {other.id} of one adapter and {token.id} of "
                    "another; wear them one at a time, or send token ids")  # fmt: skip
        special = base.special_tokens | {k: v for _, difference in changes for k, v in difference.special}
        fast, shown = _with_tokens(base.fast, tuple(added.values()))
        ids = {token.text: token.id for token in added.values()}
        eos = [ids.get(text, base.token_id(text)) for _, difference in changes for text in difference.eos]
        return Tokenizer(
            fast,
            special,
            self._template(changes),
            shown=shown,
            eos_ids=[i for i in eos if i is not None],
            sibling=base,
        )

    def _template(self, changes: Sequence[tuple[TokenizerFiles, Difference]]) -> Template:
        """Return the one template of all, with the special tokens it may name."""
        base = self.base
        wanted = {
            (files.template if difference.template else None, tuple(sorted(difference.special)))
            for files, difference in changes
        }
        if len(wanted) > 1:
            return ChatTemplateError(
                "the adapters of this mix have different chat templates; send a text or token ids to /v1/completions"
            )
        ((source, own),) = wanted
        source = base.template_source if source is None else source
        if source is None:
            return base.template
        return AdapterTemplate(source, base.special_tokens | dict(own), self._processes)

    def _id_of(self, token: AddedToken) -> int:
        """Return the id of an adapter's token: a text that the base's own vocabulary has keeps the vocabulary's id."""
        known = self._vocabulary.token_to_id(token.text)
        return token.id if known is None else int(known)


def _with_tokens(base: FastTokenizer, tokens: Sequence[AddedToken]) -> tuple[FastTokenizer, dict[int, int]]:
    """Copy `base` with tokens added; the ids it gives these -> theirs, where they differ. The vocabulary is shared."""
    if not tokens:
        return base, {}
    fast = FastTokenizer(base.model)
    fast.normalizer, fast.pre_tokenizer = base.normalizer, base.pre_tokenizer
    fast.post_processor, fast.decoder = base.post_processor, base.decoder
    texts = {token.text for token in tokens}
    wanted = {i: token for i, token in base.get_added_tokens_decoder().items() if token.content not in texts}
    wanted |= {token.id: _fast_token(token) for token in tokens}
    fast.add_tokens([wanted[i] for i in sorted(wanted)])  # at once: each call looks at all there are
    given = {fast.token_to_id(token.content): i for i, token in wanted.items()}
    return fast, {own: i for own, i in given.items() if own != i and own is not None}


def _fast_token(token: AddedToken) -> FastToken:
    flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return FastToken(token.text, **flags)


def _same_text(template: str, other: str | None) -> bool:
    """Tell whether two templates are the same: Jinja drops a newline at a template's end."""
    return other is not None and template.removesuffix("\n") == other.removesuffix("\n")
