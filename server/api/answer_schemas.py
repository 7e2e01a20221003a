"""The records that this server answers with: completions, models, adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from loraplex.server.api.schemas import Wire


class PromptDetails(Wire):
    """`prompt_tokens_details`."""

    cached_tokens: int  # found in the prefix cache, so not computed


class Usage(Wire):
    """Token counts of one request, over all of its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(Wire):
    """Completions' older form: parallel lists, one entry a token; offsets count characters of the text."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)  # null: the first token of a prompt has none
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class WrittenTokens(Wire):
    """From which token of an answer on, up to the next such record's, which versions have written it."""

    version: str | None  # as system_fingerprint has it; null: the base alone
    from_token: int  # counted from 0, in tokens that were drawn
    cache: Literal["kept", "recomputed"] | None  # keys and values of the tokens before; null: the answer's first ones


class ChangedChoice(Wire):
    """What an answer has where its version changed while it was written (POST /resume), and elsewhere has not."""

    versions: list[WrittenTokens] | None = Field(default=None, exclude_if=lambda value: value is None)


class CompletionChoice(ChangedChoice):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class PromptLogprob(Wire):
    """vLLM's, of one token at one place of a prompt."""

    logprob: float
    rank: int | None  # 1: the likeliest; null: it is not among the likeliest ones that were asked for
    decoded_token: str


class RolloutChoice(CompletionChoice):
    """A choice with what trainers ask for; what nobody asked for is null."""

    token_ids: list[int] | None  # that were drawn, the one that stops among them
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None  # null: the first token has none


class Completion(Wire):
    """Also the chunks of a stream: completions have no object of their own for them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[RolloutChoice | CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None  # the versions that answer: sql@3fa9c1d20b44; null: the base alone


class ModelPermission(Wire):
    """Kept for controllers that read vLLM's cards; everything is allowed to everybody."""

    id: str
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class ModelCard(Wire):
    """The base (`parent` null, `max_model_len` set) or an adapter (`root` its source, `parent` the base)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["loraplex"] = "loraplex"
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[ModelPermission]


class TokenizerReceipt(Wire):
    """What the tokenizer files beside an adapter change; nothing where they say what the base's do."""

    files: bool  # there are some
    chat_template: Literal["adapter", "base"] | None  # whose writes conversations
    eos_tokens: list[str]  # end its answers beside the base's
    special_tokens: dict[str, str]  # bos_token, ... -> text, where they are others than the base's
    added_tokens: dict[str, int]  # that the base has not, or under another id


class MeasuredAdapter(Wire):
    digest: str
    kind: str
    rank: int
    modules: int  # that it has tensors for
    idle_modules: int  # of these, whose tensors come to nothing
    noop: bool  # it answers as the base does; served with --allow-noop alone


class MatchedTensors(Wire):
    """Of the file, how many. A file with one that matches nothing is refused."""

    matched: int
    ignored: int
    why_ignored: str | None
    unmatched: Literal[0]
    own_rows: int  # tensors and modules that change rows of the base's norms, embedding or head


class StoredTypes(Wire):
    file: list[str]
    packed: str
    rounding: float  # |delta W as packed - delta W| / |delta W|, Frobenius


class SiteNorms(Wire):
    projections: list[str]
    modules: int
    relative: float  # |delta W| / |W| over all layers, Frobenius
    largest: float  # of one layer
    layer: int  # that one
    rounding: float


class EffectNorms(Wire):
    relative: float  # |delta W| / |W| over all of the base's linears
    bias: float  # norm of what is added to biases
    sites: list[SiteNorms]


class CheckedBase(Wire):
    digest: str
    formats: str
    named: str | None  # by the adapter's config
    is_named: bool | None  # whether that is this base, as far as names tell


class ProbeResult(Wire):
    """Largest differences in log-probability between fused answers and the plain reference."""

    tokens: int
    base: float | None
    adapter: float | None
    own_tokens: int  # of the tokens, those whose rows of embedding or head are the adapter's own, or changed by it
    error: str | None  # why there are none


class ReceiptBody(Wire):
    """What the digest of a receipt is of."""

    adapter: MeasuredAdapter
    tensors: MatchedTensors
    dtype: StoredTypes
    effect: EffectNorms
    base: CheckedBase
    probe: ProbeResult
    card: dict[str, str | list[str]]  # fields of README.md's front matter
    remark: str | None


ProofStatus = Literal["made", "pending", "failed", "none"]
"""Of a receipt; none: nobody has asked for it yet."""


class ProofAnswer(Wire):
    """The receipt that is made after a load, or where `wait` was given."""

    status: ProofStatus
    error: str | None  # of the last try
    digest: str | None
    receipt: ReceiptBody | None


class VersionCard(Wire):
    """One version of an adapter."""

    digest: str
    state: Literal["serving", "kept", "draining", "gone"]
    labels: list[str]
    scores: dict[str, float]  # that were recorded, by the sha256 of the golden set
    created: int
    source: str
    by: str | None  # the name of the key that brought it
    expires: int | None
    gone: str | None  # why: "expired", "replaced", "dropped" or "unloaded"


class AdapterReceipt(Wire):
    """What was found in an adapter's files."""

    id: str
    object: Literal["adapter"] = "adapter"
    created: int
    source: str
    digest: str | None  # null: not read in full yet
    kind: str  # "lora", "ia3": PEFT's peft_type in lower case
    rank: int  # 0: a kind that has none
    targets: list[str]
    pages: int
    remark: str | None  # it was made for another base than this, as far as its config tells, or is rounded otherwise
    tokenizer: TokenizerReceipt
    versions: list[VersionCard]  # the latest first
    proof: ProofAnswer
    expires_in: float | None = None  # seconds; null: it stays


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class AuditLine(Wire):
    """A line of the audit log (server/proof/audit.py)."""

    number: int
    previous: str
    hash: str
    when: float
    key: str
    tenant: str
    what: str
    name: str
    before: str
    after: str
    receipt: str
    card: dict[str, str | list[str]]


class AuditPage(Wire):
    object: Literal["list"] = "list"
    data: list[AuditLine]
    has_more: bool
    head_number: int
    head_hash: str
