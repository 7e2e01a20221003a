"""AdapterInfo: what is known of one adapter's content. The record is passed on whole; nobody copies its fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.adapters.files.tokenizer_files import NOTHING, TokenizerFiles
from loraplex.adapters.front import Front
from loraplex.adapters.positions import Positions


@dataclass(frozen=True)
class AdapterInfo:
    """Facts of one content of an adapter's source.

    From config and header alone `num_pages`, `nbytes` and `num_tiles` are upper bounds: modules may turn out to be
    zero. Once all of the files are read, they are exact.
    """

    rank: int  # the largest of the adapter's modules; 0: its kind has no rank
    targets: tuple[str, ...]
    num_pages: int  # of the arena
    nbytes: int  # of the adapter's tiles
    digest: str | None = None  # of the files' content; None: the files have not been read
    tokenizer: TokenizerFiles = field(default=NOTHING, repr=False)
    remark: str = ""  # what is to be known of it though it is served: made for another base, rounding
    num_tiles: int = 0  # rows of the tile table
    kind: str = "lora"  # lower case of PEFT's peft_type (format/kinds.py)
    tokens: int = 0  # the ids below it are tokens of its requests, where it has added some to the base's; else 0
    alone: str = ""  # what it has in place of the base's and is worn alone for: "norm and embed_tokens"; "": nothing
    own_ids: tuple[int, ...] = ()  # a few tokens whose rows it has in place of the base's
    invocation: tuple[int, ...] = ()  # tokens from whose last occurrence in a prompt on it acts; (): from the first on
    front: Front | None = None
    positions: Positions | None = None  # the prompt's tokens that it acts on; None: all, or as `invocation` says

    @property
    def size(self) -> str:
        """Say what log lines say of the content: "rank 8, 12 pages", or of a kind without ranks "IA3, 1 pages"."""
        return f"{f'rank {self.rank}' if self.rank else self.kind.upper()}, {self.num_pages} pages"
