"""Answers of a model whose prompts end in an opened thought, as those of Qwen3-Thinking and of R1's distills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import AddedToken

from raytune_llm.data.tokens.tokenizer import CHATML, byte_tokenizer
from tests.unit.serve.conftest import Server, serving

ASK: Any = [{"role": "user", "content": "hello"}]
END_OF_THOUGHT = len(byte_tokenizer()) + 1
SCHEMA = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}


@pytest.fixture(scope="module", params=[True, False], ids=["special", "plain"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its tags are tokens, special ones or not."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(
        [AddedToken(tag, special=request.param) for tag in ("<think>", "</think>")], special_tokens=request.param
    )
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
    assert tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True).endswith("<think>\n")
    with serving(tmp_path_factory.mktemp("adapters"), tokenizer) as server:
        yield server


def answered(server: Server, **arguments: Any) -> Any:
    """The answer of a model that ends its thought at once, where it may."""
    choice = server.client.chat.completions.create(
        model="base", messages=ASK, temperature=1, seed=1, max_tokens=200, logit_bias={str(END_OF_THOUGHT): 100}, **arguments
    ).choices[0]
    assert choice.finish_reason in ("stop", "tool_calls")
    return choice.message


def test_a_schema_is_kept_by_the_answer_after_the_thought(thinker: Server):
    format = {"type": "json_schema", "json_schema": {"name": "light", "schema": SCHEMA}}
    assert isinstance(json.loads(answered(thinker, response_format=format).content)["on"], bool)


@pytest.mark.parametrize(
    ("outputs", "allowed"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"grammar": 'root ::= "up" | "down"'}, {"up", "down"})],
)
def test_a_choice_and_a_grammar_are_kept_by_the_answer_after_the_thought(thinker: Server, outputs: Any, allowed: set[str]):
    assert answered(thinker, extra_body={"structured_outputs": outputs}).content in allowed


def test_a_tool_that_is_required_is_called_after_the_thought(thinker: Server):
    tool: Any = {"type": "function", "function": {"name": "light", "parameters": SCHEMA}}
    (call,) = answered(thinker, tools=[tool], tool_choice="required").tool_calls
    assert call.function.name == "light" and isinstance(json.loads(call.function.arguments)["on"], bool)


def test_what_is_no_schema_is_refused(thinker: Server):
    with pytest.raises(openai.BadRequestError):
        answered(thinker, extra_body={"structured_outputs": {"json": "no schema"}})
