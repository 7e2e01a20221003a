"""What an adapter's files were measured to be, as records: how much it changes the base, and what packing rounds off.

Free of torch. adapters/format/effect.py measures one module, adapters/tiers/measuring.py a whole adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from loraplex.adapters.files.model_card import Card


@dataclass(frozen=True)
class SiteEffect:
    """What an adapter adds at one site, over all layers. Norms are Frobenius norms of weights [out, in]."""

    projections: tuple[str, ...]  # last names of the base's projections that the site is made of: "q_proj", ...
    modules: int  # that the adapter changes there
    relative: float  # |delta W| / |W|, over all layers
    largest: float  # |delta W| / |W| of the layer where that is largest
    layer: int  # that layer
    rounding: float  # |delta W as packed - delta W| / |delta W|, of what is packed in the compute dtype


@dataclass(frozen=True)
class Measured:
    """One content of an adapter, read and measured in full."""

    digest: str
    kind: str  # AdapterKind.name
    rank: int
    tensors: int  # of the file, that are used: what matches nothing, and what is missing, is refused
    ignored: tuple[str, ...]  # of the file, that repeat others, as RandLoRA saves what all modules share with each
    dtypes: tuple[str, ...]  # of the file
    dtype: str  # that it is packed in
    modules: int  # that the adapter has tensors for
    idle: int  # of these, whose tensors come to nothing
    sites: tuple[SiteEffect, ...]  # that are changed, in the base's order
    relative: float  # |delta W| / |W|, over all of the base's linears
    rounding: float  # as SiteEffect.rounding, over all sites
    bias: float  # Euclidean norm of all that is added to biases
    own: int  # tensors and modules that change rows of the base's norms, embedding or head; not measured
    base_named: str | None  # the base that its config names
    card: Card = field(default_factory=dict, hash=False)  # what its README.md says of it

    @property
    def is_noop(self) -> bool:
        """Return whether the adapter answers as the base does."""
        return not self.sites and self.bias == 0 and not self.own
