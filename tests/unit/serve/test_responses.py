from __future__ import annotations

from typing import Any

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.requests import Completion, Delta
from raytune_llm.serve.api.responses import ChatResponse, Collected
from raytune_llm.serve.api.schema import ChatRequest
from raytune_llm.serve.call_parser import CALL_SYNTAXES
from raytune_llm.serve.output_parser import OutputSyntax
from raytune_llm.serve.token_bytes import TokenBytes

CALL = '<tool_call>{"name": "light", "arguments": {"level": %d}}</tool_call>'
SYNTAX = OutputSyntax(next(syntax for syntax in CALL_SYNTAXES if syntax.format == "qwen"))


def response(**fields: Any) -> ChatResponse:
    tool = {"type": "function", "function": {"name": "light"}}
    asked = {"model": "base", "messages": [{"role": "user", "content": "light!"}], "tools": [tool], **fields}
    return ChatResponse(ChatRequest.model_validate(asked), TokenBytes(byte_tokenizer()), SYNTAX, created=0)


def completion(text: str) -> Completion:
    return Completion(ids=tuple(text.encode()), text=text, finish="stop", prompt_tokens=1)


@pytest.mark.parametrize(("parallel", "levels"), [(None, [1, 2]), (True, [1, 2]), (False, [1])])
def test_calls_after_the_first_one_are_left_out_where_none_may_be_beside_it(parallel: bool | None, levels: list[int]):
    text = f"Sure. {CALL % 1}{CALL % 2}"
    wanted = [f'{{"level": {level}}}' for level in levels]
    collected = Collected(1)
    collected.add(0, Delta(completion=completion(text)))
    (choice,) = response(parallel_tool_calls=parallel).full(collected)["choices"]
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == wanted
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "Sure.")

    streaming = response(parallel_tool_calls=parallel)
    deltas = [*(Delta(text=character) for character in text), Delta(completion=completion(text))]
    chunks = [chunk["choices"][0] for delta in deltas for chunk in streaming.chunks(0, delta, usage=None)]
    streamed: dict[int, str] = {}
    for call in (call for chunk in chunks for call in chunk["delta"].get("tool_calls", ())):
        assert ("id" in call) == (call["index"] not in streamed)
        streamed[call["index"]] = streamed.get(call["index"], "") + call["function"]["arguments"]
    assert streamed == dict(enumerate(wanted)) and chunks[-1]["finish_reason"] == "tool_calls"
