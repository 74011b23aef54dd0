"""`strict` of tools: arguments are of their schema, wherever the model begins a call."""

from __future__ import annotations

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.serve.api.errors import APIError
from raytune_llm.serve.api.sampling import STRICT_CALLS, after_thought, forced_tool_grammar, strict_tools_grammar
from raytune_llm.serve.api.schema import Tool

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALLS = {
    "qwen": '<tool_call>\n{{"name": "{name}", "arguments": {{"a": {a}}}}}\n</tool_call>',
    "qwen3_5": "<tool_call>\n<function={name}>\n<parameter=a>\n{a}\n</parameter>\n</function>\n</tool_call>",
}


def tool(name: str, *, strict: bool) -> Tool:
    function = {"name": name, "parameters": SCHEMA, "strict": strict}
    return Tool.model_validate({"type": "function", "function": function})


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Grammars(tokenizer, len(tokenizer), (end,))  # type: ignore[arg-type]


@pytest.mark.parametrize("tool_format", STRICT_CALLS)
def test_arguments_of_a_strict_tool_are_of_its_schema_beside_free_text(grammars: Grammars, tool_format: str):
    def allows(text: str) -> bool:
        return grammars.matcher(grammar).accept_string(text)

    grammar = strict_tools_grammar([tool("adds", strict=True), tool("tells", strict=False)], tool_format)
    assert grammar is not None
    call = CALLS[tool_format]
    assert allows("I think so.") and allows(f"Wait. {call.format(name='adds', a=3)} And {call.format(name='adds', a=4)}")
    assert allows(call.format(name="tells", a="true"))
    assert not allows(call.format(name="adds", a="true"))
    assert not allows(call.format(name="nobody", a=3))


def test_a_way_of_writing_calls_that_can_not_be_held_to_a_schema_is_refused_by_name():
    with pytest.raises(APIError, match="tool_choice"):
        strict_tools_grammar([tool("adds", strict=True)], "llama3")
    assert strict_tools_grammar([tool("adds", strict=False)], "llama3") is None


def test_references_in_the_schema_of_a_required_call_find_what_they_name(grammars: Grammars):
    """As pydantic describes an object that holds others."""

    def tool_of(name: str, kind: str) -> Tool:
        item = {"type": "object", "properties": {"a": {"type": kind}}, "required": ["a"], "additionalProperties": False}
        properties = {"item": {"$ref": "#/$defs/Item"}}
        schema = {"$defs": {"Item": item}, "type": "object", "properties": properties, "required": ["item"]}
        return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})

    both = forced_tool_grammar([tool_of("adds", "integer"), tool_of("tells", "string")], set())
    for grammar, before in ((both, ""), (after_thought(both, "", "</think>"), "hm</think>\n\n")):
        for name, value, is_right in (
            ("adds", "3", True),
            ("adds", '"3"', False),
            ("tells", '"3"', True),
            ("nobody", "3", False),
        ):
            text = f'{before}{{"name": "{name}", "arguments": {{"item": {{"a": {value}}}}}}}'
            assert grammars.matcher(grammar).accept_string(text) == is_right, text
