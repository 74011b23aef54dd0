from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.engines.requests import Grammar
from raytune_llm.errors import ConfigError

pytest.importorskip("xgrammar")


def test_grammars_that_clients_send_without_end_do_not_fill_the_memory():
    tokenizer = byte_tokenizer()
    limit = 2**20
    grammars = Grammars(tokenizer, len(tokenizer), (tokenizer.eos_token_id,), cache_bytes=limit)
    most = 0
    for number in range(300):
        schema = {"type": "object", "properties": {f"name{number}{field}": {"type": "string"} for field in range(20)}}
        grammars.matcher(Grammar(kind="json_schema", text=json.dumps(schema)))
        most = max(most, grammars.kept_bytes)
    assert limit / 4 < most < 2 * limit


@pytest.fixture
def grammars() -> Grammars:
    tokenizer = byte_tokenizer()
    return Grammars(tokenizer, len(tokenizer), (tokenizer.eos_token_id,))


def test_json_is_indented_as_usual_and_not_filled_with_line_breaks(grammars: Grammars):
    schema = '{"type": "object", "properties": {"a": {"type": "array", "items": {"type": "object"}}}, "required": ["a"]}'
    written = {"a": [{}, {}]}
    for text, is_allowed in [
        *((json.dumps(written, indent=indent), True) for indent in (None, 2, 4)),
        ('{"a"' + "\n" * 21 + ": []}", False),
    ]:
        matcher = grammars.matcher(Grammar(kind="json_schema", text=schema))
        assert (matcher.accept_string(text) and matcher.is_completed()) == is_allowed


@pytest.mark.parametrize("kind", ["json_schema", "structural_tag"])
def test_a_schema_that_is_too_deep_is_refused(grammars: Grammars, kind: Any):
    deep = '{"items": ' * 900 + '{"const": "]}"}' + "}" * 900
    text = (
        deep
        if kind == "json_schema"
        else f'{{"type": "structural_tag", "format": {{"type": "json_schema", "json_schema": {deep}}}}}'
    )
    with pytest.raises(ConfigError, match="must have at most 64 brackets within each other"):
        grammars.matcher(Grammar(kind=kind, text=text))


@pytest.mark.parametrize(("kind", "text"), [("json_schema", '{"$ref": "#"}'), ("ebnf", "root ::= root")])
def test_a_grammar_that_allows_no_text_is_refused(grammars: Grammars, kind: Any, text: str):
    with pytest.raises(ConfigError, match="must allow a text, and allows none"):
        grammars.matcher(Grammar(kind=kind, text=text))
