"""Chat templates: Jinja in a sandbox, rendered the way transformers renders them (tests compare the two).

A template comes with a checkpoint and so from anywhere: it sees plain JSON values only, in Jinja's immutable sandbox.
The base's is rendered here, as the operator chose the base; adapters' are rendered in processes (template_process.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraplex.adapters.files.tokenizer_files import TEMPLATE_FILE, default_template

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Template variables with a meaning of their own: chat_template_kwargs cannot set them."""


class ChatTemplateError(ValueError):
    """Say that messages cannot be rendered: no template, a broken one, or one that refused them."""


class ChatTemplate:
    """Render conversations by one compiled template. Thread-safe: rendering keeps no state here."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token, ... as the template may name them. Raises ChatTemplateError."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Write the prompt text of `messages`. extra: further template variables; tools: functions as OpenAI has them.

        A "developer" message is shown to templates that do not know the role as "system", which it renames.
        Raises ChatTemplateError.
        """
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if "developer" not in self.source:
            chat = [{**m, "role": "system"} if m["role"] == "developer" else m for m in chat]
        variables = {**self._special_tokens, **(extra or {})}
        variables.update(messages=chat, tools=tools, documents=None, add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error
        except Exception as error:  # templates are programs: they fail in every way a program can
            raise ChatTemplateError(f"the chat template failed on the messages: {error!r}") from error


def read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Read a checkpoint's default template: chat_template.jinja, else tokenizer_config.json's (a string or several)."""
    file = folder / TEMPLATE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else default_template(tokenizer_config)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["namespace"] = _Namespace
    return env


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote, for training: here only a body."""

    tags = {"generation"}  # noqa: RUF012  declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Jinja's namespace() without underscore names, which would lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_attribute(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes HTML characters: a model should not read &lt;
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
