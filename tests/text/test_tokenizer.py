"""The tokenizer against transformers' own: ids, chat templates, special tokens."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex.server.text.chat_template import ChatTemplateError
from loraplex.server.text.tokenizer import Tokenizer
from loraplex.server.text.tokenizer_reading import TokenizerError
from tests.support.tiny import BOS, EOS, make_tiny_tokenizer
from tests.support.vocabularies import make_byte_fallback_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Hé, 😀 what's up?\n\n  ok"},
    {"role": "assistant", "content": "Not much."},
    {"role": "user", "content": "quote \" and 'this'"},
]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
        "message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # blocks on lines of their own: what trim_blocks and lstrip_blocks are for
    "indented": """{{ bos_token }}
{%- for message in messages %}
    {% if message.role == "user" %}
  U: {{ message.content | trim }}
    {% elif message.role == "assistant" %}
        {% generation %}
  A: {{ message.content }}
        {% endgeneration %}
    {% else %}
  S: {{ message.content }}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
  A:
{% endif %}""",
    "json_and_namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}\n{% endfor %}"
        "{{ ns.n }} {{ {'b': [1, 'é<'], 'a': none} | tojson(indent=2) }}{{ strftime_now('%Y') }}"
        "{% if tools %}tools{% endif %}{% if documents is none %}no documents{% endif %}{{ dict(a=1) | tojson }}"
    ),
    "extra_variable": (
        "{{ bos_token }}{{ messages[-1].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.read(folder)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return _oracle(folder)


def _oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _copy_with(folder: Path, target: Path, *, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a tokenizer folder with other fields in tokenizer_config.json."""
    shutil.copytree(folder, target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    for name in drop:
        (target / name).unlink(missing_ok=True)
    return target


@given(text=st.text(max_size=60))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_encodes_and_decodes_as_transformers(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == oracle(text)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids, skip_special_tokens=False)


@given(text=st.text(max_size=60) | st.text("the quick brown", max_size=200))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_text_is_longer_than_its_tokens_may_be(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    assert len(text) <= tokenizer.max_characters(len(oracle(text)["input_ids"]))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_templates_as_transformers(folder: Path, tmp_path: Path, name: str, generation_prompt: bool) -> None:
    path = _copy_with(folder, tmp_path / "t", drop=("chat_template.jinja",), chat_template=TEMPLATES[name])
    ours, theirs = Tokenizer.read(path), _oracle(path)
    for conversation in (CONVERSATION, CONVERSATION[:2], CONVERSATION[1:3], CONVERSATION[1:]):
        expected = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generation_prompt)
        assert ours.render_chat(conversation, generation_prompt) == expected
        ids = theirs.apply_chat_template(conversation, add_generation_prompt=generation_prompt)["input_ids"]
        assert ours.chat(conversation, generation_prompt) == ids


def test_tools_reach_the_template_as_in_transformers(folder: Path, tmp_path: Path) -> None:
    template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ messages | tojson }}"
    path = _copy_with(folder, tmp_path / "t", drop=("chat_template.jinja",), chat_template=template)
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    tools = [{"type": "function", "function": function}]
    for passed in (tools, None):
        expected = _oracle(path).apply_chat_template(CONVERSATION, tools=passed, tokenize=False)
        assert Tokenizer.read(path).render_chat(CONVERSATION, False, tools=passed) == expected
    assert Tokenizer.read(path).template_source == template


def test_template_variables_reach_the_template(folder: Path, tmp_path: Path) -> None:
    path = _copy_with(folder, tmp_path / "t", drop=("chat_template.jinja",), chat_template=TEMPLATES["extra_variable"])
    expected = _oracle(path).apply_chat_template(CONVERSATION, tokenize=False, enable_thinking=False)
    assert Tokenizer.read(path).render_chat(CONVERSATION, False, {"enable_thinking": False}) == expected
    assert expected.endswith("False")


def test_template_sources(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    from_config = _copy_with(folder, tmp_path / "named", drop=("chat_template.jinja",), chat_template=named)
    assert Tokenizer.read(from_config).render_chat(CONVERSATION) == "D"
    both = _copy_with(folder, tmp_path / "both", chat_template="old")
    (both / "chat_template.jinja").write_text("new")
    assert Tokenizer.read(both).render_chat(CONVERSATION) == "new"


def test_chat_never_has_two_bos(tokenizer: Tokenizer, oracle: Any) -> None:
    bos = oracle.bos_token_id
    ids = tokenizer.chat(CONVERSATION)
    assert ids.count(bos) == 1
    assert ids[0] == bos
    # a rendered chat sent as a completion's prompt spells its own
    assert tokenizer.encode(tokenizer.render_chat(CONVERSATION)) == ids
    assert tokenizer.encode(BOS + "x", add_special_tokens=False) == tokenizer.encode("x")


@pytest.mark.parametrize("flags", [(True, False), (False, False), (True, True), (False, True), (None, True)])
def test_bos_and_eos_flags_of_the_config(folder: Path, tmp_path: Path, flags: tuple[bool | None, bool]) -> None:
    given_flags = {k: v for k, v in zip(("add_bos_token", "add_eos_token"), flags, strict=True) if v is not None}
    path = _copy_with(folder, tmp_path / "t", **given_flags)
    assert Tokenizer.read(path).encode("an answer") == _oracle(path)("an answer")["input_ids"]


def test_special_tokens_only_the_config_knows(folder: Path, tmp_path: Path) -> None:
    extra = {"320": {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}}
    path = _copy_with(folder, tmp_path / "t", added_tokens_decoder=extra, pad_token="<|pad|>")
    ours, theirs = Tokenizer.read(path), _oracle(path)
    text = "a<|late|>b<|pad|>c" + EOS
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == "abc"


def test_truncation_and_padding_stored_in_the_file_do_not_act(folder: Path, tmp_path: Path) -> None:
    path = _copy_with(folder, tmp_path / "t")
    stored = json.loads((path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
    stored["padding"] = {**padding, "pad_id": 1, "pad_type_id": 0, "pad_token": EOS}
    (path / "tokenizer.json").write_text(json.dumps(stored))
    assert Tokenizer.read(path).encode("the quick brown fox") == Tokenizer.read(folder).encode("the quick brown fox")


@given(text=st.text(alphabet=st.sampled_from("aé€😀 \n�the"), max_size=30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_token_bytes_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_token_bytes_of_sentencepiece_style_vocabularies(tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(make_byte_fallback_tokenizer(tmp_path))
    ids = tokenizer.encode("hello hé😀", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " hello hé😀".encode()
    assert tokenizer.token_text(ids[-1]) == "�"  # the last byte of the emoji


def test_special_and_unknown_tokens_have_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(0) == BOS
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([5, 10**6]) == tokenizer.decode([5])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role here') }}", "no system role here"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages[0].nothing.there }}", "refused"),
        ("{% for %}", "does not compile"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_template_failures_are_told(folder: Path, tmp_path: Path, template: str, reason: str) -> None:
    path = _copy_with(folder, tmp_path / "t", drop=("chat_template.jinja",), chat_template=template)
    tokenizer = Tokenizer.read(path)
    with pytest.raises(ChatTemplateError, match=reason):
        tokenizer.chat(CONVERSATION)
    assert tokenizer.encode("still here")


def test_without_a_template_only_chat_fails(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.read(_copy_with(folder, tmp_path / "t", drop=("chat_template.jinja",), chat_template=None))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.chat(CONVERSATION)


def test_developer_becomes_system_for_templates_that_do_not_know_it(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert "system\nx" in Tokenizer.read(folder).render_chat(messages)
    path = _copy_with(folder, tmp_path / "t")
    (path / "chat_template.jinja").write_text("{% if messages[0].role == 'developer' %}D{% endif %}")
    assert Tokenizer.read(path).render_chat(messages) == "D"


def test_without_tokenizer_json_transformers_converts(tmp_path: Path, folder: Path) -> None:
    from transformers import GPT2Tokenizer

    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    slow = GPT2Tokenizer(vocab=model["vocab"], merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS)
    slow.save_pretrained(tmp_path)
    vocab_only = tmp_path / "old"
    vocab_only.mkdir()
    (vocab_only / "vocab.json").write_text(json.dumps(model["vocab"]))
    (vocab_only / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges))
    (vocab_only / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": BOS, "eos_token": EOS, "unk_token": EOS})
    )
    tokenizer = Tokenizer.read(vocab_only)
    assert tokenizer.encode("the other one") == slow("the other one")["input_ids"]
    assert tokenizer.decode(tokenizer.encode("the other one")) == "the other one"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Tokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.read(tmp_path)


def test_long_texts_leave_the_interpreter_to_others(tokenizer: Tokenizer) -> None:
    """While one thread encodes, this one goes on: the encoder must let go of the interpreter lock.

    Nothing else makes it let go here. On a busy machine this thread may come too late a few times.
    """
    text = "the quick brown fox and the other 😀 " * 10_000

    def goes_on_meanwhile() -> bool:
        begun, done = threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            tokenizer.encode(text)
            done.set()

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        meanwhile = not done.is_set()
        thread.join()
        return meanwhile

    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        assert any(goes_on_meanwhile() for _ in range(20))
    finally:
        sys.setswitchinterval(interval)
