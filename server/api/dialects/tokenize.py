"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter
from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.adapters.throttle import Throttle
from loraplex.server.api.body import body_schema
from loraplex.server.api.chat_schemas import Message, Tool
from loraplex.server.api.conversation import Conversation, read_toolbox
from loraplex.server.api.dialects.lorax_schemas import SimpleToken
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import check_unknown, ignored_header
from loraplex.server.api.limits import check_length
from loraplex.server.api.names import tokenizer_of
from loraplex.server.api.openapi import answers, failures
from loraplex.server.api.schemas import Incoming, Wire
from loraplex.server.api.services import Services
from loraplex.server.api.sse import answer_or_disconnect
from loraplex.server.tenancy.tenants import current_key
from loraplex.server.text.tokenizer import Tokenizer

T = TypeVar("T")

MAX_TOKENS = 1 << 20
"""Of a list to be made text."""

PIECE, REST = 256, 4.0
"""Tokens that are written at a time, in 0.3 ms, and seconds of rest for each of work once that took 1 ms: a long answer
holds the interpreter's lock for a fifth of the time."""

_SIMPLE_TOKENS = TypeAdapter(list[SimpleToken])


class TokenizeRequest(Incoming):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    inputs: str | None = None  # LoRAX's: the answer is LoRAX's, too
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    add_special_tokens: bool | None = None  # null: true for a text; a conversation has those of its template
    add_generation_prompt: bool | None = None  # null: true
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(Wire):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Incoming):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_TOKENS)]


class TokenizerInfo(Wire):
    """What a client needs to encode and to render chats by itself, in the words of tokenizer_config.json."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int


class DetokenizeAnswer(Wire):
    prompt: str


def make_router(services: Services) -> APIRouter:
    """The routes, working with `services`."""
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest), **answers(TokenizeAnswer | list[SimpleToken]))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        record = await services.bodies.read(request, TokenizeRequest)
        headers = ignored_header(check_unknown(record.model_extra or {}))
        tokenizer = _tokenizer(services, record.model)
        if record.inputs is not None:
            check_length(len(record.inputs), tokenizer, services.facts, "inputs")
            encode = partial(_as_lorax, tokenizer, record.inputs, record.add_special_tokens is not False)
            content = await _in_turn(services, request, tokenizer, len(record.inputs), encode)
            return Response(content, media_type="application/json", headers=headers)
        if (record.prompt is None) == (record.messages is None):
            raise InvalidField("prompt", "prompt: give either a prompt or messages")
        texts = [record.prompt] if record.prompt is not None else [m.content or "" for m in record.messages or ()]
        size = sum(map(len, texts))
        check_length(size, tokenizer, services.facts, "prompt" if record.prompt is not None else "messages")
        answer = await _in_turn(services, request, tokenizer, size, partial(_encode, services, tokenizer, record))
        return Response(answer, media_type="application/json", headers=headers)

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest), **answers(DetokenizeAnswer))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        record = await services.bodies.read(request, DetokenizeRequest)
        headers = ignored_header(check_unknown(record.model_extra or {}))
        tokenizer = _tokenizer(services, record.model)
        decode = partial(tokenizer.decode, record.tokens, False)
        text = await _in_turn(services, request, tokenizer, len(record.tokens), decode)
        answer = DetokenizeAnswer(prompt=text)
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    @router.get("/tokenizer_info", responses=failures((400, 401, 404)))
    async def tokenizer_info(model: str | None = None) -> TokenizerInfo:
        """The special tokens and the chat template of the base, or of the adapter that `model` names."""
        tokenizer = _tokenizer(services, model)
        special = tokenizer.special_tokens
        return TokenizerInfo(
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            unk_token=special.get("unk_token"),
            chat_template=tokenizer.template_source,
            model_max_length=services.facts.max_model_len,
        )

    return router


async def _in_turn(services: Services, request: Request, tokenizer: Tokenizer, size: int, work: Callable[[], T]) -> T:
    """In a thread, when it is the caller's turn, unless the client has left by then. Raises Overloaded, ClientGone."""
    done = services.texts.run(current_key().tenant, size, tokenizer.renders_slowly, work)
    return await answer_or_disconnect(request, done)


def _as_lorax(tokenizer: Tokenizer, text: str, special: bool) -> bytes:
    tokens, throttle = tokenizer.encode_offsets(text, special), Throttle(lambda: None, REST)
    pieces = []
    while piece := [SimpleToken(id=i, text=t, start=a, stop=b) for i, t, a, b in islice(tokens, PIECE)]:
        pieces.append(_SIMPLE_TOKENS.dump_json(piece)[1:-1])
        throttle()
    return b"[%s]" % b",".join(pieces)


def _tokenizer(services: Services, model: str | None) -> Tokenizer:
    """That of the base, or of the adapters that `model` names. Raises ApiError for a name that nobody has."""
    return services.tokenizers.base if model is None else tokenizer_of(services, model)


def _encode(services: Services, tokenizer: Tokenizer, record: TokenizeRequest) -> str:
    ids = _ids(services, tokenizer, record)
    answer = TokenizeAnswer(
        count=len(ids),
        max_model_len=services.facts.max_model_len,
        tokens=ids,
        token_strs=_texts(tokenizer, ids) if record.return_token_strs else None,
    )
    return answer.model_dump_json()


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    texts: list[str] = []
    throttle = Throttle(lambda: None, REST)
    for start in range(0, len(ids), PIECE):
        texts += map(tokenizer.token_text, ids[start : start + PIECE])
        throttle()
    return texts


def _ids(services: Services, tokenizer: Tokenizer, record: TokenizeRequest) -> list[int]:
    if record.prompt is not None:
        return tokenizer.encode(record.prompt, record.add_special_tokens is not False)
    conversation = Conversation(
        record.messages or [],
        read_toolbox(record.tools, record.tool_choice, None, services.limits),
        template_values=record.chat_template_kwargs,
        add_generation_prompt=record.add_generation_prompt is not False,
    )
    return list(conversation.on(tokenizer).prompt().ids)
