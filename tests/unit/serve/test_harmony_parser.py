"""Answers of gpt-oss, as its templates and its model write them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import AddedToken

from raytune_llm.data.templates.named import load
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.engines.requests import Grammar
from raytune_llm.serve.api.sampling import after_thought
from raytune_llm.serve.harmony_parser import WORDS, HarmonyParser
from raytune_llm.serve.output_parser import OutputSyntax, parser_of
from tests.unit.serve.test_output_parser import CALLS, TOOLS, in_pieces, joined

COMMENTARY = "<|channel|>commentary"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>hm<|end|>", "<|channel|>final<|message|>so<|return|>"
SYNTAX = OutputSyntax.of("<|channel|> <|message|>", prompt="<|start|>assistant", tools=True)
LIGHT = ("light", {"room": "hall"})


def read(text: str, size: int = 1000, *, syntax: OutputSyntax = SYNTAX, names: Any = TOOLS) -> dict[str, Any]:
    parser = parser_of(syntax, names)
    return joined([part for piece in in_pieces(text, size) for part in parser.push(piece)] + parser.finish())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (f"{ANALYSIS}<|start|>assistant{FINAL}", "so", "hm", []),
        (FINAL, "so", "", []),
        ("<|channel|>final<|message|>a < b <|x", "a < b <|x", "", []),
        (
            f'{ANALYSIS}<|start|>assistant{COMMENTARY} to=functions.light <|constrain|>json<|message|>{{"room": "hall"}}<|call|>',
            "",
            "hm",
            [LIGHT],
        ),
        (
            f"{COMMENTARY}<|message|>Sure.<|end|><|start|>assistant to=functions.light{COMMENTARY} json<|message|>"
            '{"room": "hall"}<|call|><|start|>assistant<|channel|>commentary to=functions.light<|message|>{"room": "hall"}',
            "Sure.",
            "",
            [LIGHT] * 2,
        ),
        ("<|channel|>commentary to=functions.light<|message|><|call|>", "", "", [("light", {})]),
        ("<|channel|>analysis<|message|>no end<|start|>assistant<|channel|>final<|message|>so", "so", "no end", []),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assis", "", "hm", []),
        ("no header <|at all", "no header <|at all", "", []),
        ("to", "to", "", []),
    ],
)
def test_pieces_of_any_size_are_read_alike(size: int, text: str, content: str, reasoning: str, calls: list[Any]):
    assert read(text, size) == {"content": content, "reasoning": reasoning, "calls": calls}


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_call_that_no_tool_of_the_request_takes_stays_text(size: int):
    call = ' to=functions.light<|channel|>commentary json<|message|>{"room": "hall"}<|call|>'
    assert read(call, size, names=frozenset({"other"})) == {"content": call, "reasoning": "", "calls": []}
    without = OutputSyntax.of("<|channel|> <|message|>", prompt="<|start|>assistant", tools=False)
    assert read(call, size, syntax=without, names=None)["content"] == call
    browsing = "<|channel|>commentary to=browser.search<|message|>{}<|call|>"
    assert read(browsing, size)["content"] == browsing


def test_parts_are_told_as_they_come():
    parser = parser_of(SYNTAX, TOOLS)
    assert isinstance(parser, HarmonyParser)
    pieces = ("<|channel|>commentary to=functions.light", '<|message|>{"a', '": 1}', "<|ca", "ll|>")
    told = [[(part.kind, part.text) for part in parser.push(piece)] for piece in pieces]
    assert told == [[], [("call", "light"), ("arguments", '{"a')], [("arguments", '": 1}')], [], []]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("thought", [None, "let me\nsee"])
def test_what_the_named_template_writes_is_read_back(thought: str | None, size: int):
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = load("gpt_oss").source
    tools = [{"type": "function", "function": {"name": name, "description": name}} for name in sorted(TOOLS)]

    def rendered(*messages: Any) -> str:
        ends = messages[-1]["role"] == "assistant"
        return tokenizer.apply_chat_template([*messages], tools=tools, tokenize=False, add_generation_prompt=not ends)

    asked = {"role": "user", "content": "Light?"}
    for calls, content in ((CALLS, ""), ([], "It is <b>lit</b>.")):
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        prompt, text = rendered(asked), rendered(asked, answer | ({"reasoning_content": thought} if thought else {}))
        assert text.startswith(prompt)
        syntax = OutputSyntax.of(load("gpt_oss").source, prompt=prompt, tools=True)
        found = read(text[len(prompt) :], size, syntax=syntax)
        expected = [(call["name"], call["arguments"]) for call in calls]
        assert found == {"content": content, "reasoning": thought or "", "calls": expected}


def test_an_answer_of_a_grammar_follows_a_thought_unless_the_prompt_has_its_header():
    call = json.dumps({"name": "light", "arguments": {"room": "hall"}})
    forced = SYNTAX.under_grammar(is_call=True)
    begin, end = SYNTAX.thought_before_grammar or ("", "")
    assert read(f"{begin}hm{end}{call}", 3, syntax=forced) == {"content": "", "reasoning": "hm", "calls": [LIGHT]}
    begun = OutputSyntax.of("<|channel|> <|message|>", prompt="<|start|>assistant<|channel|>final<|message|>", tools=True)
    assert begun.thought_before_grammar is None
    assert read(call, 3, syntax=begun.under_grammar(is_call=True))["calls"] == [LIGHT]
    assert read('{"on": true}', 3, syntax=begun.under_grammar(is_call=False))["content"] == '{"on": true}'


def test_the_grammar_takes_the_format_s_special_tokens_around_the_thought():
    made: Any = byte_tokenizer()
    made.add_tokens([AddedToken(word, special=True) for word in WORDS], special_tokens=True)
    thought = SYNTAX.thought_before_grammar
    assert thought is not None
    grammar = after_thought(Grammar(kind="json_schema", text='{"type": "object"}'), *thought)
    matcher = Grammars(made, len(made), (made.eos_token_id,)).matcher(grammar)
    ids = made(f'{thought[0]}hm, "so"\n{thought[1]}{{"on": true}}', add_special_tokens=False).input_ids
    assert all(matcher.accept_token(id) for id in [*ids, made.eos_token_id])
    assert matcher.is_terminated()
    assert not Grammars(made, len(made), (made.eos_token_id,)).matcher(grammar).accept_token(made("{").input_ids[0])
