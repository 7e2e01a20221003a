"""Strangers' chat templates: rendered as here, and bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from loraplex.server.text.chat_template import ChatTemplate, ChatTemplateError
from loraplex.server.text.template_process import AdapterTemplate, TemplateProcesses
from tests.text.test_tokenizer import CONVERSATION, TEMPLATES

ASKED: dict[str, Any] = {"messages": CONVERSATION[1:]}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def processes() -> Iterator[TemplateProcesses]:
    made = TemplateProcesses()
    yield made
    made.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_here(processes: TemplateProcesses, name: str) -> None:
    template = AdapterTemplate(TEMPLATES[name], SPECIAL, processes)
    here = ChatTemplate(TEMPLATES[name], SPECIAL)
    tools = [{"type": "function", "function": {"name": "f"}}]
    for asked in ((CONVERSATION[1:], True, {"enable_thinking": False}, tools), (CONVERSATION[1:3], False, None, None)):
        assert template.render(*asked) == here.render(*asked)


def test_what_a_template_refuses_is_told(processes: TemplateProcesses) -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        processes.render("{{ raise_exception('roles must alternate') }}", {}, **ASKED)
    with pytest.raises(ChatTemplateError, match="does not compile"):
        processes.render("{% if %}", {}, **ASKED)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' * 20000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    ],
)
def test_one_that_takes_too_much_is_ended_and_not_tried_again(processes: TemplateProcesses, source: str) -> None:
    for _ in range(2):
        with pytest.raises(ChatTemplateError, match=r"is not rendered: it (takes|makes) more than"):
            processes.render(source, {}, **ASKED)
    assert processes.render("fine", {}, **ASKED) == "fine"


def test_the_environment_is_not_the_servers(processes: TemplateProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret")
    own = TemplateProcesses()
    try:
        own.render("x", {}, **ASKED)
        child = own._idle.queue[-1]._process
        assert child is not None
        with open(f"/proc/{child.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
    finally:
        own.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_one_that_died_is_started_again() -> None:
    processes = TemplateProcesses()
    try:
        assert processes.render("a", {}, **ASKED) == "a"
        child = processes._idle.queue[-1]._process
        assert child is not None
        child.kill()
        child.wait()
        assert processes.render("b", {}, **ASKED) == "b"
    finally:
        processes.close()
