"""Responses that later requests may refer to: in memory, bounded, the least recently used make room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraplex.server.api.chat_schemas import Message
from loraplex.server.api.openai.responses_schemas import OutputMessage, ResponseObject
from loraplex.server.tenancy.tenants import current_key

MAX_RESPONSES = 4096
MAX_CHARS = 64 << 20
"""Of all conversations together, counted once for every response."""

SCORE_CHARS = 500
"""What a log-probability counts for, as it is kept: a record with a text, a number and bytes."""


@dataclass
class StoredResponse:
    """A response, the conversation up to and with it, and the work on it while it goes on in the background."""

    response: ResponseObject
    items: list[dict[str, Any]]  # its own input
    messages: Sequence[Message] = ()  # without instructions: those are each request's own
    task: asyncio.Task[None] | None = None
    size: int = 0
    tenant: str = field(default_factory=lambda: current_key().tenant)  # who may see it


class ResponseStore:
    """By id. One thread only."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_chars: int = MAX_CHARS) -> None:
        self._max_responses = max_responses
        self._max_chars = max_chars
        self._chars = 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, stored: StoredResponse) -> None:
        """Keep it, or count it anew after it has grown. Older ones go; work in the background keeps its place."""
        key = stored.response.id
        self.pop(key)
        stored.size = sum(_chars(message) for message in stored.messages) + SCORE_CHARS * _scores(stored.response)
        self._kept[key] = stored
        self._chars += stored.size
        for old in [key for key, each in self._kept.items() if each.task is None]:
            if len(self._kept) <= self._max_responses and self._chars <= self._max_chars:
                break
            self.pop(old)

    def get(self, response_id: str) -> StoredResponse | None:
        """The response, now the most recently used one; None also for another tenant's."""
        stored = self._kept.get(response_id)
        if stored is None or stored.tenant != current_key().tenant:
            return None
        self._kept.move_to_end(response_id)
        return stored

    def pop(self, response_id: str) -> StoredResponse | None:
        """Forget it."""
        stored = self._kept.pop(response_id, None)
        if stored is not None:
            self._chars -= stored.size
        return stored

    @property
    def num_working(self) -> int:
        """Responses whose work goes on."""
        return sum(stored.task is not None for stored in self._kept.values())


def _chars(message: Message) -> int:
    calls = sum(len(call.function.arguments) for call in message.tool_calls or ())
    return len(message.content or "") + len(message.reasoning_content or "") + calls + 100


def _scores(response: ResponseObject) -> int:
    """Log-probabilities it holds."""
    messages = (item for item in response.output if isinstance(item, OutputMessage))
    parts = (part for message in messages for part in message.content)
    return sum(1 + len(score.top_logprobs) for part in parts for score in part.logprobs)
