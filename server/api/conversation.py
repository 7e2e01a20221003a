"""A conversation and its tools, checked, to what a chat template is given and to what the answer is held to.

A Conversation is what the client said. Which template writes it is known when the adapter is leased: `on` then gives
the Dialogue, the same conversation as one tokenizer writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from loraplex.server.api.chat_schemas import Message, Tool
from loraplex.server.api.errors import InvalidField, UnsupportedField
from loraplex.server.api.limits import check_schema
from loraplex.server.api.prompts import GenerationOptions, Prompt, PromptSource
from loraplex.server.api.schemas import kind_of
from loraplex.server.api.tools.message_parser import MessageParser, WholeMessage
from loraplex.server.api.tools.tool_formats import GENERIC, ToolFormat, describe_tools, find_format, fit_strict
from loraplex.server.config import RequestLimits
from loraplex.server.text.chat_template import RESERVED, ChatTemplateError
from loraplex.server.text.grammar_spec import GrammarSpec, Thought
from loraplex.server.text.tokenizer import Tokenizer

Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request and what the answer may do with them."""

    tools: tuple[Tool, ...]  # those the answer may call; none: what looks like a call is text
    required: bool  # the answer is a call, or several
    parallel: bool  # more than one
    size: int = 0  # characters of the tools as JSON

    @property
    def binds(self) -> bool:
        """Whether calls are held to their schemas while they are written."""
        return self.required or any(tool.function.strict for tool in self.tools)


def read_toolbox(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None, limits: RequestLimits) -> Toolbox:
    """Of `tools`, `tool_choice` and `parallel_tool_calls`. Raises InvalidField."""
    given = tuple(tools or ())
    names = [tool.function.name for tool in given]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidField(f"tools[{i}].function.name", f"tools[{i}].function.name: {name!r} is there already")
    text = f"[{','.join(tool.model_dump_json() for tool in given)}]" if given else ""
    check_schema(text, "tools", limits)
    mode, allowed = _read_choice(choice)
    if mode is None:
        mode = "auto" if given else "none"
    for name in allowed or ():
        if name not in names:
            raise InvalidField("tool_choice", f"tool_choice: there is no tool {name[:64]!r} in tools")
    if mode == "required" and not given:
        raise InvalidField("tool_choice", "tool_choice: a call is required, but there are no tools")
    usable = tuple(tool for tool in given if allowed is None or tool.function.name in allowed)
    named = isinstance(choice, dict) and choice.get("type") == "function"
    return Toolbox(
        tools=usable if mode != "none" else (),
        required=mode == "required",
        parallel=parallel is not False and not named,
        size=len(text),
    )


def _read_choice(choice: Any) -> tuple[Choice | None, list[str] | None]:
    """The mode (None: not given) and the names that may be called (None: all)."""
    match choice:
        case None:
            return None, None
        case "none" | "auto" | "required":
            return choice, None
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return "required", [name]
        case {"type": "allowed_tools", "allowed_tools": dict(inner)}:
            return _read_choice({**inner, "type": "allowed_tools"})
        case {"type": "allowed_tools", "mode": ("auto" | "required") as mode, "tools": list(tools)}:
            return mode, [_tool_name(tool) for tool in tools]
    shown = repr(choice)[:60] if isinstance(choice, str) else kind_of(choice)
    raise InvalidField(
        "tool_choice",
        'tool_choice: expected \'none\', \'auto\', \'required\', {"type": "function", "function": {"name": ...}} or '
        f"allowed_tools, found {shown}",
    )


def _tool_name(tool: Any) -> str:
    match tool:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
    raise InvalidField(
        "tool_choice", f"tool_choice: expected the names of functions in allowed_tools, found {tool!r:.60}"
    )


class Conversation:
    """One request's messages and tools."""

    def __init__(
        self,
        messages: Sequence[Message],
        toolbox: Toolbox,
        *,
        template_values: Mapping[str, Any] | None = None,
        reasoning_effort: str | None = None,
        add_generation_prompt: bool = True,
        param: str = "messages",
        instructed: bool = False,
    ) -> None:
        """`template_values`: chat_template_kwargs. `param` is the field the messages came in.

        instructed: a system message is none of the caller's own. Raises InvalidField.
        """
        self.template_values = dict(template_values or {})
        if taken := RESERVED.intersection(self.template_values):
            message = f"chat_template_kwargs: {min(taken)!r} is set by the request's own fields"
            raise InvalidField("chat_template_kwargs", message)
        self.param = param
        self.toolbox = toolbox
        self.reasoning_effort = reasoning_effort
        self.add_generation_prompt = add_generation_prompt
        self.messages = [_template_message(message, f"{param}[{i}]") for i, message in enumerate(messages)]
        self.is_rewritten = instructed or bool(toolbox.tools) or any(message.role == "tool" for message in messages)
        self.size = sum(len(message.content or "") for message in messages)
        others = [self.template_values, *({**message, "content": None} for message in self.messages)]
        self._rest = toolbox.size + len(str(others))  # characters, about, of what else the prompt is made of
        self._dialogue: Dialogue | None = None

    def on(self, tokenizer: Tokenizer) -> Dialogue:
        """The conversation as `tokenizer` writes it. Raises UnsupportedField."""
        if self._dialogue is None or self._dialogue.tokenizer is not tokenizer:
            self._dialogue = Dialogue(self, tokenizer)
        return self._dialogue

    def source(self) -> PromptSource:
        """Where a Generation reads the prompt, and what the answer is held to."""

        def refine(tokenizer: Tokenizer, options: GenerationOptions) -> GenerationOptions:
            dialogue = self.on(tokenizer)
            return replace(options, grammar=dialogue.grammar(options.grammar), show_special=dialogue.show_special)

        def read(tokenizer: Tokenizer) -> list[Prompt]:
            return [self.on(tokenizer).prompt()]

        return PromptSource(self.param, (self.size,), read, refine, self._rest)


class Dialogue:
    """A conversation as one tokenizer writes it."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer) -> None:
        """Raises UnsupportedField."""
        self.tokenizer = tokenizer
        self.toolbox = conversation.toolbox
        template = tokenizer.template_source or ""
        self.format: ToolFormat = find_format(template)
        self._conversation = conversation
        self._thinks = "<think>" in template
        self._template_values = _effort(template, conversation.reasoning_effort) | conversation.template_values

    @property
    def show_special(self) -> bool:
        """Whether the answer can only be read with its special tokens."""
        return bool(self.toolbox.tools) and self.format.show_special

    def prompt(self) -> Prompt:
        """Rendered and encoded. Raises InvalidField."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.toolbox.tools]
        conversation = self._conversation
        messages: list[dict[str, Any]] = conversation.messages
        if self.format is GENERIC:
            messages = describe_tools(messages, tools)
        native = tools if tools and self.format.native else None
        try:
            text = self._render(messages, native)
        except ChatTemplateError as error:
            # what it refuses (a system message, two user turns in a row) may be of our making
            try:
                text = self._render(fit_strict(messages), native) if conversation.is_rewritten else ""
            except ChatTemplateError:
                text = ""
            if not text:
                raise InvalidField(conversation.param, f"{conversation.param}: {error}") from error
        return Prompt(self.tokenizer.encode(text, add_special_tokens=False), self._thought(text))

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """Raises ChatTemplateError."""
        return self.tokenizer.render_chat(
            messages, self._conversation.add_generation_prompt, self._template_values, tools=tools
        )

    def grammar(self, structured: tuple[str, GrammarSpec] | None) -> tuple[str, GrammarSpec] | None:
        """What the answer is held to and the field that asked: the form in `structured`, or calls, or either.

        Raises InvalidField where one rules the other out.
        """
        if structured is None:
            return ("tools", GrammarSpec("lark", self._calls(self.toolbox.required))) if self.toolbox.binds else None
        param, spec = structured
        if self.toolbox.required:
            raise InvalidField("tool_choice", f"tool_choice: the answer cannot be a call and hold to {param} as well")
        return param, replace(spec, alternative=self._calls(required=True)) if self.toolbox.tools else spec

    def _calls(self, required: bool) -> str:
        return self.format.grammar(
            [tool.function.model_dump(exclude_none=True) for tool in self.toolbox.tools],
            required=required,
            parallel=self.toolbox.parallel,
            token_id=self.tokenizer.token_id,
        )

    def parser(self, thought: Thought) -> MessageParser:
        """For one answer to the prompt, which left the model in `thought`."""
        return MessageParser(thought, self.format.make_parser() if self.toolbox.tools else None)

    def read(self, text: str, thought: Thought) -> WholeMessage:
        """A whole answer taken apart."""
        parser, message = self.parser(thought), WholeMessage(self.format.new_id)
        message.add(parser.feed(text))
        message.add(parser.end())
        return message

    def _thought(self, prompt: str) -> Thought:
        if not self._thinks:
            return "none"
        opened, closed = prompt.rfind("<think>"), prompt.rfind("</think>")
        if opened > closed and not prompt[opened + len("<think>") :].strip():
            return "open"
        # with thinking turned off, templates end the prompt with an empty thought
        return "none" if closed >= 0 and not prompt[closed + len("</think>") :].strip() else "possible"


def _effort(template: str, reasoning_effort: str | None) -> dict[str, Any]:
    """A field that only some templates have. Raises UnsupportedField."""
    if reasoning_effort is None:
        return {}
    if "reasoning_effort" not in template:
        raise UnsupportedField(
            "reasoning_effort", "'reasoning_effort' is not supported: the chat template has no such control."
        )
    return {"reasoning_effort": reasoning_effort}


def _template_message(message: Message, where: str) -> dict[str, Any]:
    """As chat templates expect it: arguments of calls are objects. Raises InvalidField."""
    calls = message.tool_calls or []
    if calls and message.role != "assistant":
        raise InvalidField(f"{where}.tool_calls", f"{where}.tool_calls: only the assistant calls, not {message.role!r}")
    if message.tool_call_id is not None and message.role != "tool":
        found = f"{where}.tool_call_id: only messages of role 'tool' have one, this is {message.role!r}"
        raise InvalidField(f"{where}.tool_call_id", found)
    content = message.content if message.content is not None else message.refusal
    if content is None and not calls:
        raise InvalidField(f"{where}.content", f"{where}.content: this field is required", "missing_required_parameter")
    result = message.model_dump(include={"role", "name", "reasoning_content", "tool_call_id"}, exclude_none=True)
    if content is not None:
        result["content"] = content
    if calls:
        result["tool_calls"] = [
            {
                **({"id": call.id} if call.id is not None else {}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in calls
        ]
    return result


def _arguments(text: str) -> Any:
    """Parsed, "null" as no arguments, or as they are where an earlier answer was no JSON."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return text
    if value is None:
        return {}
    return value if isinstance(value, dict) else text
