"""Tools and thoughts in chat: what the prompt says of them, what answers become, what holds them to their schemas."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from loraplex.server.api.conversation import Dialogue
from loraplex.server.api.tools.call_objects import CallArguments, CallStart, Piece, Text
from loraplex.server.api.tools.tool_formats import MAX_CALLS, ToolFormat, find_format
from loraplex.server.engine.request import Constraint
from loraplex.server.text.grammar import Grammars
from loraplex.server.text.grammar_spec import GrammarSpec
from tests.support.asking import CHAT, chat, events_of
from tests.support.fake_serving import EOS_ID, FakeServer, say
from tests.support.tiny import VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {"what": {"enum": ["hen", 'a "hare"']}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["what"],
}
HUNT = {"type": "function", "function": {"name": "hunt", "description": "of a fox", "parameters": SCHEMA}}
SLEEP = {"type": "function", "function": {"name": "sleep"}}
CALL = '<tool_call>\n{"name": "hunt", "arguments": {"what": "hen"}}\n</tool_call>'

TEMPLATES = {
    "generic": "{{ messages }}",
    "hermes": "{% if tools %}<tools>{{ tools }}</tools> in <tool_call></tool_call>{% endif %}",
    "llama": '{{ tools }} {"name": function name, "parameters": dictionary of argument name and its value}',
    "pythonic": "{{ tools }} [func_name1(params_name1=params_value1)]",
    "mistral": "[AVAILABLE_TOOLS]{{ tools }} [TOOL_CALLS]",
    "mistral_named": "[AVAILABLE_TOOLS]{{ tools }} [TOOL_CALLS]name[ARGS]",
}
NATIVE = "{{ tools | tojson }}|{% for m in messages %}{{ m | tojson }}{% endfor %}<tool_call>"


def deltas_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [event["choices"][0] for event in events_of(response)]


STRICT = """{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<' ~ m.role ~ '>' ~ m.content }}
{%- endfor %}"""
"""As Gemma's: no system message, and turns that alternate."""


async def test_rewriting_fits_a_strict_template(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    server.use_template(STRICT)
    client = server.client()
    call = {"id": "c", "type": "function", "function": {"name": "hunt", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "a hen"},
        {"role": "user", "content": "and now?"},
    ]
    answer = await client.post(CHAT, json=chat(messages=messages, tools=[HUNT], max_tokens=4))
    assert answer.status_code == 200, answer.text
    prompt = server.prompt()
    assert prompt.startswith("<user># Tools")
    assert prompt.index('"hunt"') < prompt.index("hi<assistant><tool_call>")
    assert prompt.endswith("<user><tool_response>\na hen\n</tool_response>\n\nand now?")
    answer = await client.post("/v1/responses", json={"model": "base", "input": "hi", "instructions": "Be brief."})
    assert answer.status_code == 200, answer.text
    assert server.prompt() == "<user>Be brief.\n\nhi"


async def test_what_the_caller_sent_itself_is_refused_by_a_strict_template(server: FakeServer) -> None:
    server.use_template(STRICT)
    client = server.client()
    for messages, why in (
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}], "System role not supported"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "must alternate"),
    ):
        answer = await client.post(CHAT, json=chat(messages=messages))
        assert answer.status_code == 400
        assert why in answer.json()["error"]["message"]


async def test_an_answer_with_calls(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, f"I will.\n\n{CALL}\n{CALL}", request)
    [choice] = (await roomy.post(CHAT, json=chat(tools=[HUNT]))).json()["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("tool_calls", "I will.")
    first, second = message["tool_calls"]
    assert first["id"] != second["id"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "hunt", "arguments": '{"what": "hen"}'}
    # without tools, or when they may not be called, it is text
    for body in (chat(), chat(tools=[HUNT], tool_choice="none")):
        [choice] = (await roomy.post(CHAT, json=body)).json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", f"I will.\n\n{CALL}\n{CALL}")
        assert "tool_calls" not in choice["message"]
        assert "hunt" not in server.prompt()


async def test_a_stream_with_calls(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, f"I will.\n\n{CALL}\n{CALL}", request)
    body = chat(tools=[HUNT], stream=True, n=2, logprobs=True)
    whole = (await roomy.post(CHAT, json=body | {"stream": False})).json()["choices"]
    for index, choices in enumerate(
        [[c for c in deltas_of(await roomy.post(CHAT, json=body)) if c["index"] == i] for i in (0, 1)]
    ):
        calls: dict[int, dict[str, str]] = {}
        for choice in choices:
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert (part["type"], part["function"]["name"]) == ("function", "hunt")
                    assert part["index"] == len(calls)
                    calls[part["index"]] = {"id": part["id"], "arguments": ""}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
        assert [call["arguments"] for call in calls.values()] == ['{"what": "hen"}'] * 2
        assert len({call["id"] for call in calls.values()}) == 2
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "I will."
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["tool_calls"]
        scored = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        assert scored == whole[index]["logprobs"]["content"]


async def test_an_answer_cut_in_a_call_says_length(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    server.engine.script = lambda request: say(server.tokenizer, CALL, request)
    size = len(server.tokenizer.encode(CALL[:60], False))
    [choice] = (await roomy.post(CHAT, json=chat(tools=[HUNT], max_tokens=size))).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert '{"what": "hen"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


AFTER = [
    {"role": "system", "content": "you are a fox"},
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abc", "type": "function", "function": {"name": "hunt", "arguments": '{"what": "hen"}'}},
            {"id": "abd", "type": "function", "function": {"name": "sleep", "arguments": "no json"}},
        ],
    },
    {"role": "tool", "tool_call_id": "abc", "content": "got it"},
]


async def test_templates_without_tools(roomy: httpx.AsyncClient, server: FakeServer) -> None:
    """The system message tells of them, once, and earlier calls and results are text."""
    await roomy.post(CHAT, json=chat(messages=AFTER, tools=[HUNT, SLEEP], max_tokens=1))
    prompt = server.prompt()
    assert (
        prompt.index("you are a fox") < prompt.index("<tools>") < prompt.index('"of a fox"') < prompt.index("user\nhi<")
    )
    assert prompt.count("# Tools") == 1
    assert CALL in prompt
    assert '{"name": "sleep", "arguments": "no json"}' in prompt
    assert "<tool_response>\ngot it\n</tool_response>" in prompt
    await roomy.post(CHAT, json=chat(tools=[SLEEP], max_tokens=1))
    assert server.prompt().index("# Tools") < server.prompt().index("user\nhi<")


async def test_templates_with_tools(server: FakeServer) -> None:
    """They get what transformers would give them: the tools as they came, arguments as objects."""
    server.use_template(NATIVE)
    server.max_model_len = 2048
    client = server.client()
    await client.post(CHAT, json=chat(messages=AFTER, tools=[HUNT, SLEEP], max_tokens=1))
    tools, _, messages = server.prompt().partition("|")
    assert json.loads(tools) == [HUNT, SLEEP]
    assert '"arguments": {"what": "hen"}' in messages
    assert '"tool_call_id": "abc"' in messages
    assert '"content": null' not in messages
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "function": {"name": "sleep"}}],
    }
    await client.post(CHAT, json=chat(tools=[HUNT, SLEEP], tool_choice=allowed, max_tokens=1))
    assert json.loads(server.prompt().partition("|")[0]) == [SLEEP]
    await client.post(CHAT, json=chat(max_tokens=1))
    assert server.prompt().startswith("null|")


async def test_special_marks_are_read_where_a_family_has_them(server: FakeServer) -> None:
    server.use_template(TEMPLATES["llama"])
    server.max_model_len = 2048
    text = '{"name": "sleep", "parameters": {}}<|im_end|>'
    server.engine.script = lambda request: say(server.tokenizer, text, request)
    client = server.client()
    [plain] = (await client.post(CHAT, json=chat())).json()["choices"]
    [called] = (await client.post(CHAT, json=chat(tools=[SLEEP]))).json()["choices"]
    assert plain["message"]["content"] == text.removesuffix("<|im_end|>")
    assert called["message"]["tool_calls"][0]["function"]["name"] == "sleep"


# ------------------------------------------------------------------------------------------- what holds calls to a form


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({"tools": [HUNT]}, False),
        ({"tools": [HUNT], "tool_choice": "auto"}, False),
        ({"tools": [HUNT], "tool_choice": "none", "guided_regex": None}, False),
        ({"tools": [HUNT], "tool_choice": "required"}, True),
        ({"tools": [HUNT], "tool_choice": {"type": "function", "function": {"name": "hunt"}}}, True),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, True),
        ({"tools": [HUNT], "response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
    ],
)
async def test_when_answers_are_held(roomy: httpx.AsyncClient, server: FakeServer, fields: Any, bound: bool) -> None:
    response = await roomy.post(CHAT, json=chat(**fields, n=2, max_tokens=1))
    assert response.status_code == 200, response.text
    first, second = (request.constraint for request in server.engine.requests)
    assert (first is not None, second is not None) == (bound, bound)
    assert first is not second or not bound


async def test_many_tools_keep_nobody_else_waiting(
    roomy: httpx.AsyncClient, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rules and the prompt that tells of them are made in other threads than the event loop's."""
    threads: dict[str, threading.Thread] = {}
    render, rules = Dialogue._render, ToolFormat.grammar

    def rendering(self: Dialogue, *args: Any) -> str:
        threads["prompt"] = threading.current_thread()
        return render(self, *args)

    def ruling(self: ToolFormat, *args: Any, **kwargs: Any) -> str:
        threads["rules"] = threading.current_thread()
        return rules(self, *args, **kwargs)

    monkeypatch.setattr(Dialogue, "_render", rendering)
    monkeypatch.setattr(ToolFormat, "grammar", ruling)
    for count, elsewhere in ((1, False), (100, True)):
        tools = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 50}} for i in range(count)]
        await roomy.post("/v1/chat/completions", json=chat(tools=tools, tool_choice="required"))
        assert {name: thread is not threading.main_thread() for name, thread in threads.items()} == {
            "prompt": elsewhere,
            "rules": elsewhere,
        }


def test_families_are_told_by_their_templates() -> None:
    assert {name: find_format(template).name for name, template in TEMPLATES.items()} == {n: n for n in TEMPLATES}
    assert find_format("{{ tools }} <tool_call>\n<function=f>").name == "generic"  # XML inside
    assert find_format("{{ tools }} <unknown_calls>").name == "generic"


def allowed_by(place: Constraint, output: list[int]) -> NDArray[np.bool_]:
    return np.unpackbits(place.allowed(output), bitorder="little").view(np.bool_)


def write(grammars: Grammars, server: FakeServer, rules: str, seed: int) -> str:
    """Any answer the grammar allows, with a leaning to end."""
    place, output, rng = grammars.compile(GrammarSpec("lark", rules)).start(), list[int](), random.Random(seed)
    for _ in range(3000):
        allowed = np.flatnonzero(allowed_by(place, output)).tolist()
        if EOS_ID in allowed and rng.random() < 0.4:
            break
        output.append(rng.choice([token for token in allowed if token != EOS_ID] or [EOS_ID]))
        if output[-1] == EOS_ID:
            break
    return server.tokenizer.decode(output, skip_special_tokens=True)


def read(form: ToolFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    parser = form.make_parser()
    plain, calls = "", list[list[str]]()
    pieces: list[Piece] = [*parser.feed(text), *parser.end()]
    for piece in pieces:
        match piece:
            case Text(more):
                plain += more
            case CallStart(name):
                calls.append([name, ""])
            case CallArguments(more):
                calls[-1][1] += more
    return plain, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_forced_can_be_read(server: FakeServer, name: str, parallel: bool) -> None:
    """Grammar and parser of each family agree, and arguments follow their schemas."""
    form, grammars = find_format(TEMPLATES[name]), Grammars(server.tokenizer, VOCAB_SIZE, (EOS_ID,))
    tools = [HUNT["function"], SLEEP["function"]]
    rules = form.grammar(tools, required=True, parallel=parallel, token_id=server.tokenizer.token_id)  # type: ignore[arg-type]
    counts = set()
    for seed in range(12):
        plain, calls = read(form, write(grammars, server, rules, seed))
        assert plain.strip() == ""
        counts.add(len(calls))
        for called, arguments in calls:
            schema = {**SCHEMA, "additionalProperties": False} if called == "hunt" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
    assert min(counts) == 1
    assert (max(counts) == 1) != parallel
    assert max(counts) <= MAX_CALLS


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_of_strict_tools_are_the_models_own_idea(server: FakeServer, name: str) -> None:
    """Text goes through, calls are held."""
    form, grammars = find_format(TEMPLATES[name]), Grammars(server.tokenizer, VOCAB_SIZE, (EOS_ID,))
    rules = form.grammar(
        [SLEEP["function"]], required=False, parallel=True, token_id=server.tokenizer.token_id  # type: ignore[list-item]
    )  # fmt: skip
    grammar = grammars.compile(GrammarSpec("lark", rules))

    def accepts(text: str) -> bool:
        place, output = grammar.start(), list[int]()
        for token_id in [*server.tokenizer.encode(text, add_special_tokens=False), EOS_ID]:
            if not allowed_by(place, output)[token_id]:
                return False
            output.append(token_id)
        return True

    forced = form.grammar([SLEEP["function"]], required=True, parallel=True, token_id=server.tokenizer.token_id)  # type: ignore[list-item]
    call = write(grammars, server, forced, 0)
    assert accepts("just text")
    assert accepts("")
    assert accepts(call)
    assert not accepts(call.replace("sleep", "creep")) or name.startswith(
        "mistral"
    )  # there the mark is a special token


# ------------------------------------------------------------------------------------------------------------- thoughts

THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}<think>\n{% endif %}{# </think> #}"
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("opened", [False, True])
async def test_thoughts_are_told_apart(server: FakeServer, stream: bool, opened: bool) -> None:
    server.use_template(THINKING)
    answer = ("" if opened else "<think>\n") + "the fox\n</think>\n\nthe end"
    server.engine.script = lambda request: say(server.tokenizer, answer, request)
    client = server.client()
    body = chat(stream=stream, chat_template_kwargs={"enable_thinking": opened})
    response = await client.post(CHAT, json=body)
    if stream:
        deltas = [choice["delta"] for choice in deltas_of(response)]
        thought, text = ("".join(d.get(name, "") for d in deltas) for name in ("reasoning_content", "content"))
    else:
        message = response.json()["choices"][0]["message"]
        thought, text = message["reasoning_content"], message["content"]
    assert (thought, text) == ("the fox", "the end")


async def test_a_form_binds_what_comes_after_the_thought(server: FakeServer) -> None:
    server.use_template(THINKING)
    client = server.client()
    body = chat(guided_choice=["yes"], chat_template_kwargs={"enable_thinking": True}, max_tokens=1)
    await client.post(CHAT, json=body)
    await client.post(CHAT, json=body | {"chat_template_kwargs": {}})
    opened, possible = (request.constraint for request in server.engine.requests)
    assert opened is not None
    assert possible is not None
    letter, less, yes = (server.tokenizer.encode(text, False)[0] for text in ("q", "<", "y"))
    assert allowed_by(opened, [])[[letter, less, yes]].tolist() == [True, True, True]
    assert allowed_by(possible, [])[[letter, less, yes]].tolist() == [False, True, True]


async def test_the_effort_reaches_templates_that_have_it(server: FakeServer) -> None:
    server.use_template("{{ reasoning_effort }} {{ messages[0].content }}")
    client = server.client()
    await client.post(CHAT, json=chat(reasoning_effort="high", max_tokens=1))
    assert server.prompt() == "high hi"
