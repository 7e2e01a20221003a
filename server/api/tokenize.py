"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from loraplex.server.api.body import body_schema
from loraplex.server.api.chat_schemas import Message, Tool
from loraplex.server.api.conversation import Conversation, read_toolbox
from loraplex.server.api.errors import InvalidField
from loraplex.server.api.fields import check_unknown, ignored_header
from loraplex.server.api.lorax_schemas import SimpleToken
from loraplex.server.api.names import check_model
from loraplex.server.api.openapi import READ, answers, failures
from loraplex.server.api.parts import Parts
from loraplex.server.api.schemas import Incoming, Wire
from loraplex.server.engine.tokenizer import Tokenizer

MAX_TOKENS = 1 << 20
"""Of a list to be made text."""


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


def make_router(parts: Parts) -> APIRouter:
    """The routes, working with `parts`."""
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest), **answers(TokenizeAnswer | list[SimpleToken]))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a conversation."""
        record = await parts.bodies.read(request, TokenizeRequest)
        headers = ignored_header(check_unknown(record.model_extra or {}))
        _check_model(parts, record.model)
        if record.inputs is not None:
            return await _as_lorax(parts.tokenizer, record.inputs, record.add_special_tokens is not False, headers)
        if (record.prompt is None) == (record.messages is None):
            raise InvalidField("prompt", "prompt: give either a prompt or messages")
        ids = await asyncio.to_thread(_encode, parts, record)
        answer = TokenizeAnswer(
            count=len(ids),
            max_model_len=parts.base.max_model_len,
            tokens=ids,
            token_strs=[parts.tokenizer.token_text(i) for i in ids] if record.return_token_strs else None,
        )
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest), **answers(DetokenizeAnswer))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        record = await parts.bodies.read(request, DetokenizeRequest)
        headers = ignored_header(check_unknown(record.model_extra or {}))
        _check_model(parts, record.model)
        text = await asyncio.to_thread(parts.tokenizer.decode, record.tokens, False)
        answer = DetokenizeAnswer(prompt=text)
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    @router.get("/tokenizer_info", responses=failures(READ))
    async def tokenizer_info() -> TokenizerInfo:
        """The tokenizer's special tokens and chat template."""
        special = parts.tokenizer.special_tokens
        return TokenizerInfo(
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            unk_token=special.get("unk_token"),
            chat_template=parts.tokenizer.template_source,
            model_max_length=parts.base.max_model_len,
        )

    return router


async def _as_lorax(tokenizer: Tokenizer, text: str, special: bool, headers: dict[str, str]) -> Response:
    found = await asyncio.to_thread(tokenizer.encode_offsets, text, special)
    tokens = [SimpleToken(id=i, text=token, start=start, stop=stop) for i, token, start, stop in found]
    content = TypeAdapter(list[SimpleToken]).dump_json(tokens)
    return Response(content, media_type="application/json", headers=headers)


def _check_model(parts: Parts, model: str | None) -> None:
    """All names share the base's tokenizer; one that nobody has is still an error. Raises ApiError."""
    if model is not None:
        check_model(parts, model)


def _encode(parts: Parts, record: TokenizeRequest) -> list[int]:
    tokenizer = parts.tokenizer
    if record.prompt is not None:
        return tokenizer.encode(record.prompt, record.add_special_tokens is not False)
    conversation = Conversation(
        tokenizer,
        record.messages or [],
        read_toolbox(record.tools, record.tool_choice, None, parts.limits),
        template_values=record.chat_template_kwargs or {},
        add_generation_prompt=record.add_generation_prompt is not False,
    )
    return list(conversation.prompt().ids)
