"""vLLM's command lines for adapters mean the same here."""

from __future__ import annotations

import pytest

from loraplex.server.command.cli import _one_each
from loraplex.server.config_adapters import NamedAdapter
from loraplex.server.options import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "sql=/adapters/a=b",
        '{"name": "sql", "path": "/adapters/a=b"}',
        '{"name": "sql", "path": "/adapters/a=b", "base_model_name": "base"}',
    ],
)
def test_lora_modules_are_pairs_or_json(text: str) -> None:
    assert NamedAdapter.parse_module(text) == NamedAdapter("sql", "/adapters/a=b")


@pytest.mark.parametrize("text", ["sql", "=x", "sql=", "{", '{"name": "sql"}', '{"name": 1, "path": "x"}'])
def test_wrong_lora_modules_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--lora-modules"):
        NamedAdapter.parse_module(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("serve demo --lora-modules a=x b=y --port 1", "serve demo --lora-modules a=x --lora-modules b=y --port 1"),
        ("serve --lora-modules a=x demo c=d", "serve --lora-modules a=x demo c=d"),
        ("--lora-modules a=x --lora-modules b=y", "--lora-modules a=x --lora-modules b=y"),
        ('--lora-modules {"a":1} {"b":2}', '--lora-modules {"a":1} --lora-modules {"b":2}'),
        ("--lora-modules wrong", "--lora-modules wrong"),
        ("serve demo --adapter a=x", "serve demo --adapter a=x"),
    ],
)
def test_several_values_after_one_flag(given: str, expected: str) -> None:
    assert list(_one_each(given.split())) == expected.split()
