"""How each model family writes tool calls: found by its chat template, read by a parser, forced by a grammar.

A template of a family that is not known here is treated like one without tools: the tools are described in the system
message and calls are asked for in Hermes' form, which most models have seen.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.server.api.tools.call_parsers import CallParser, NamedCalls, PythonicCalls, TaggedCalls, WholeCalls
from loraplex.server.text.grammar_spec import COMPACT
from loraplex.server.text.schema_ends import close_objects, end_numbers, real_dates

MAX_CALLS = 32
"""Calls one answer may be made to hold; without a bound a small model may go on for ever."""

_ALPHANUMERIC = string.ascii_letters + string.digits

_FREE = "free[lazy]: /(?s:.*)<tool_call>/\nTEXT: /(?s:.*)/\n"


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates refuse others."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True)
class ToolFormat:
    """One family's."""

    name: Literal["hermes", "llama", "pythonic", "mistral", "mistral_named", "generic"]
    make_parser: Callable[[], CallParser]
    argument_key: str = "arguments"
    native: bool = True  # the template itself describes the tools and writes calls and results
    show_special: bool = False  # its marks are special tokens: the answer must be read with them
    new_id: Callable[[], str] = _long_id

    def grammar(
        self, tools: Sequence[dict[str, Any]], *, required: bool, parallel: bool, token_id: Callable[[str], int | None]
    ) -> str:
        """Lark rules for an answer that is calls of `tools` ({"name", "parameters"}), or may be (not `required`)."""
        rules = [_call_rule(self.argument_key, i, tool) for i, tool in enumerate(tools)]
        one = "one: " + " | ".join(f"call_{i}" for i in range(len(tools)))
        return "\n".join([self._frame(required, MAX_CALLS if parallel else 1, token_id), one, *rules])

    def _frame(self, required: bool, most: int, token_id: Callable[[str], int | None]) -> str:
        """The rules around `one` call, for at most `most` of them."""

        def more(between: str, call: str = "one") -> str:
            return f"({json.dumps(between)} {call}){{0,{most - 1}}}" if most > 1 else ""

        match self.name:
            case "hermes" | "generic":
                call = '"\\n" one "\\n</tool_call>"'
                if required:
                    return f'start: "<tool_call>" {call} {more(chr(10) + "<tool_call>", call)}'
                return f"start: (free {call}){{0,{most}}} TEXT\n{_FREE}"
            case "mistral" | "mistral_named":
                mark = token_id("[TOOL_CALLS]")
                opening = f"<[{mark}]>" if mark is not None else '"[TOOL_CALLS]"'
                calls = f'{opening} "[" one {more(", ")} "]"'
            case _:
                calls = f"one {more('; ')}"
        if required:
            return f"start: {calls}"
        plain = "[^{]" if self.name in ("llama", "pythonic") else "."
        return f"start: calls | TEXT\ncalls: {calls}\nTEXT: /(?s:{plain}.*)?/"


def _call_rule(argument_key: str, i: int, tool: dict[str, Any]) -> str:
    head = f'{{"name": {json.dumps(tool["name"])}, "{argument_key}": '
    return f'call_{i}: {json.dumps(head)} arguments_{i} "}}"\narguments_{i}: %json {json.dumps(_closed(tool))}'


def _closed(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool's schema, without arguments that it does not name where it lists them."""
    schema = tool.get("parameters") or {}
    if not {
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "$ref",
        "anyOf",
        "allOf",
        "oneOf",
    } & set(schema):
        schema = {"type": "object", **schema, "additionalProperties": False}
    schema = end_numbers(real_dates(close_objects(schema)))
    return {**schema, "x-guidance": {**COMPACT, "lenient": tool.get("strict") is not True}}


def _tagged() -> CallParser:
    return TaggedCalls("<tool_call>", "</tool_call>")


GENERIC = ToolFormat("generic", _tagged, native=False)


def find_format(template: str) -> ToolFormat:
    """The format of the family whose chat template this is."""
    if "tools" not in template or "<function=" in template:  # the latter: Qwen3-Coder's calls are XML
        return GENERIC
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template or "[CALL_ID]" in template:
            return ToolFormat("mistral_named", NamedCalls, show_special=True, new_id=_short_id)
        return ToolFormat("mistral", lambda: TaggedCalls("[TOOL_CALLS]"), show_special=True, new_id=_short_id)
    if "<tool_call>" in template:
        return ToolFormat("hermes", _tagged)
    if "func_name1(" in template:
        return ToolFormat("pythonic", PythonicCalls, "parameters", show_special=True)
    if '"parameters": dictionary' in template or "<|python_tag|>" in template:
        return ToolFormat("llama", lambda: WholeCalls("<|python_tag|>"), "parameters", show_special=True)
    return GENERIC


# ------------------------------------------------------------------------- for templates that know nothing of tools

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def describe_tools(messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` in plain roles: the tools in the system message, calls and their results as text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    text = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] in ("system", "developer"):
        return [{**plain[0], "content": f"{plain[0].get('content') or ''}\n\n{text}".lstrip()}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def fit_strict(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` in the roles that the strictest templates know: user and assistant in turns, the user first.

    What a system message says comes before what the first user turn does, and neighbouring user turns are one.
    """
    said = [str(m.get("content") or "") for m in messages if m["role"] in ("system", "developer")]
    turns = [m for m in messages if m["role"] not in ("system", "developer")]
    if any(said):
        turns = [{"role": "user", "content": "\n\n".join(filter(None, said))}, *turns]
    fitted: list[dict[str, Any]] = []
    for turn in turns:
        if fitted and fitted[-1]["role"] == turn["role"] == "user":
            joined = f"{fitted[-1].get('content') or ''}\n\n{turn.get('content') or ''}"
            fitted[-1] = {**fitted[-1], "content": joined}
        else:
            fitted.append(turn)
    return fitted


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [
        "<tool_call>\n"
        + json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in calls
    ]
    text = "\n".join([*([message["content"]] if message.get("content") else []), *written])
    return {"role": "assistant", "content": text}
