from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from raytune_llm.data.templates.named import load, names
from raytune_llm.data.templates.tool_calls import EXTRACTORS, render_calls
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.native.text import TextStream
from raytune_llm.serve.answer_parser import OutputPart
from raytune_llm.serve.call_parser import CALL_SYNTAXES, CallSyntax, call_syntax_of
from raytune_llm.serve.output_parser import OutputParser, OutputSyntax
from raytune_llm.serve.prompts import Prompts

SYNTAXES = {syntax.format: syntax for syntax in CALL_SYNTAXES}
QWEN = OutputSyntax(SYNTAXES["qwen"], ("<think>", "</think>"))
CALL = '<tool_call>\n{"name": "light", "arguments": {"room": "hall"}}\n</tool_call>'
TOOLS = frozenset({"light", "dim"})
CALLS = [
    {"name": "light", "arguments": {"room": "hall", "levels": [1, {"deep": "a } ] b \\ c"}], "text": 'say "<b>"'}},
    {"name": "dim", "arguments": {"by": 2}},
]


def read(syntax: OutputSyntax, pieces: list[str], names: frozenset[str] | None = None) -> dict[str, Any]:
    parser = OutputParser(syntax, names)
    return joined([part for piece in pieces for part in parser.push(piece)] + parser.finish())


def joined(parts: list[OutputPart]) -> dict[str, Any]:
    texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
    calls: list[list[str]] = []
    for part in parts:
        if part.kind == "call":
            assert part.id.startswith("call_")
            calls.append([part.text, ""])
        elif part.kind == "arguments":
            calls[-1][1] += part.text
    return {**texts, "calls": [(name, json.loads(arguments)) for name, arguments in calls]}


def in_pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


LIGHT = ("light", {"room": "hall"})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("plain <b>text</b>", "plain <b>text</b>", "", []),
        ("<think>\nhm <tool\n</think>\n\nyes", "yes", "hm <tool", []),
        (f"Sure.\n{CALL}", "Sure.", "", [LIGHT]),
        (f"<think>\nlet me\n</think>\n\n{CALL}\n{CALL}", "", "let me", [LIGHT] * 2),
        (f"Sure.\n{CALL}\nDone, I hope.", "Sure.Done, I hope.", "", [LIGHT]),
        ("a < b and <tool", "a < b and <tool", "", []),
        ("<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", "", []),
        (f"<tool_call>\nnot json\n</tool_call>\n{CALL}", "<tool_call>\nnot json\n</tool_call>", "", [LIGHT]),
        ("<think>\nnever ends", "", "never ends", []),
        ("say <think> twice", "say <think> twice", "", []),
        ('<tool_call>{"arguments": {"room": "hall"}, "name": "light"}</tool_call>', "", "", [LIGHT]),
        ('<tool_call>{"name": "light", "arguments": {"room": "hall"}</tool_call> So.', "So.", "", [LIGHT]),
        ('<tool_call>{"name": "light", "arguments": {"room": "hall"}, "id": [{}]}</tool_call>', "", "", [LIGHT]),
        ('<tool_call>{"name": "light", "arguments": {"room": "hall"}}', "", "", [LIGHT]),
    ],
)
def test_pieces_of_any_size_are_read_alike(size: int, text: str, content: str, reasoning: str, calls: list[Any]):
    assert read(QWEN, in_pieces(text, size)) == {"content": content, "reasoning": reasoning, "calls": calls}


def test_text_is_told_as_it_comes():
    parser = OutputParser(QWEN)
    assert [part.text for piece in ("one ", "two <", "b> ") for part in parser.push(piece)] == ["one", " two", " <b>"]


def test_a_call_is_told_by_its_name_first_and_its_arguments_as_they_come():
    parser, told = OutputParser(QWEN, TOOLS), []
    for piece in (
        "Sure. <tool_call>\n",
        '{"name": "light", "arg',
        'uments": {"room',
        '": "ha',
        'll"}}',
        "\n</tool_call>",
        "Next.",
    ):
        told.append([(part.kind, part.text) for part in parser.push(piece)])
    assert told == [
        [("content", "Sure.")],
        [],
        [("call", "light"), ("arguments", '{"room')],
        [("arguments", '": "ha')],
        [("arguments", 'll"}')],
        [],
        [("content", "Next.")],
    ]


def test_a_call_that_is_complete_is_told_before_the_next_begins():
    for syntax in SYNTAXES.values():
        parser, text = OutputParser(OutputSyntax(syntax), TOOLS), written(syntax, CALLS[:1])
        told = [part.kind for part in parser.push(text)]
        assert told == (["call", "arguments"] if syntax.end or syntax.head else []), syntax.format


def test_a_prompt_that_ends_in_a_thought_starts_the_answer_there():
    syntax = OutputSyntax.of("{{ '<think>' }}", prompt="<|im_start|>assistant\n<think>\n")
    assert read(syntax, ["why\n</think>\n\nso"]) == {"content": "so", "reasoning": "why", "calls": []}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("template", ["seed_oss", "kimi_vl", "gemma4", "qwen3"])
def test_thoughts_are_found_by_the_words_of_their_template(template: str, size: int):
    start, end = load(template).thought
    found = read(OutputSyntax.of(load(template).source), in_pieces(f"{start}why{end}so", size))
    assert found == {"content": "so", "reasoning": "why", "calls": []}


def test_under_a_grammar_only_a_thought_that_the_prompt_begins_is_one():
    assert read(QWEN.under_grammar(is_call=False), ["<think>x</think>"])["content"] == "<think>x</think>"
    thinking = OutputSyntax(QWEN.calls, QWEN.think, starts_thinking=True).under_grammar(is_call=True)
    found = read(thinking, in_pieces('hm</think>\n\n{"name": "light", "arguments": {"room": "hall"}}', 2), TOOLS)
    assert found == {"content": "", "reasoning": "hm", "calls": [LIGHT]}


def test_what_a_length_cuts_of_a_forced_call_is_its_text_or_the_beginning_of_its_arguments():
    syntax = QWEN.under_grammar(is_call=True)
    assert read(syntax, ['{"name": "li'])["content"] == '{"name": "li'
    parser = OutputParser(syntax, TOOLS)
    parts = parser.push('{"name": "light", "arguments": {"roo') + parser.finish()
    assert [(part.kind, part.text) for part in parts] == [("call", "light"), ("arguments", '{"roo')]


def test_a_call_of_an_unknown_tool_stays_text():
    for syntax in SYNTAXES.values():
        text = written(syntax, CALLS[:1])
        for size in (1, 1000):
            found = read(OutputSyntax(syntax), in_pieces(text, size), frozenset({"other"}))
            assert found["content"].strip() == text.strip() and not found["calls"], syntax.format


def test_without_tools_nothing_is_a_call():
    assert read(OutputSyntax.of("<tool_call>", tools=False), [CALL])["content"] == CALL


def test_text_that_can_be_no_call_is_told_as_it_comes_in_formats_without_a_start():
    for format, call_like in (("llama3", '{"a": 1}'), ("glm4", "light\nis good")):
        parser = OutputParser(OutputSyntax(SYNTAXES[format]), TOOLS)
        assert [part.text for piece in ("just ", "text") for part in parser.push(piece)] == ["just ", "text"]
        assert read(OutputSyntax(SYNTAXES[format]), in_pieces(call_like, 1), TOOLS)["content"] == call_like


# Every format, as its template is written and its tokens are given ----------------------------------------------------------


def deepseek(calls: list[Any], *, version: str = "3.1") -> str:
    """As the model's own templates write them: those of V3 and R1 with a type and in blocks of code."""
    begin, separator = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
    all = [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in calls]
    if version == "3.1":
        texts = [f"{begin}{name}{separator}{arguments}<｜tool▁call▁end｜>" for name, arguments in all]
        return f"<｜tool▁calls▁begin｜>{''.join(texts)}<｜tool▁calls▁end｜>"
    texts = [f"{begin}function{separator}{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>" for name, arguments in all]
    return f"<｜tool▁calls▁begin｜>{chr(10).join(texts)}<｜tool▁calls▁end｜>"


def written(syntax: CallSyntax, calls: list[Any]) -> str:
    """The calls as a model writes them, with the text that its template puts before them."""
    if syntax.format == "deepseek":
        return deepseek(calls)
    return {"mistral": "[TOOL_CALLS] "}.get(syntax.format, "") + render_calls(syntax.format, calls)


@cache
def tokenizer(*, special: bool) -> PreTrainedTokenizerFast:
    """Of bytes; the words of all formats are special tokens, or text."""
    made: Any = byte_tokenizer()
    if special:
        words = sorted({word for syntax in CALL_SYNTAXES for word in syntax.words} | {"<think>", "</think>"})
        made.add_tokens([AddedToken(word, special=True) for word in words], special_tokens=True)
    return made


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("format", SYNTAXES)
def test_calls_are_found_whether_their_words_are_tokens_or_text(format: str, special: bool):
    syntax = OutputSyntax(SYNTAXES[format], ("<think>", "</think>"))
    calls = CALLS[:1] if format == "glm4" else CALLS  # which has one call a turn
    thought = "<think>\nhm\n</think>\n\n"
    ids = tokenizer(special=special)(thought + written(SYNTAXES[format], calls), add_special_tokens=False).input_ids
    ids = [*ids, tokenizer(special=special).pad_token_id]  # a special token that is no part of the text
    stream = TextStream(tokenizer(special=special), (), Prompts(tokenizer(special=special)).special_ids(syntax.words))
    found = read(syntax, [*(stream.push(id) for id in ids), stream.finish()], TOOLS)
    assert found == {"content": "", "reasoning": "hm", "calls": [(call["name"], call["arguments"]) for call in calls]}


def test_newer_mistral_models_write_names_and_arguments_without_a_list():
    syntax = OutputSyntax(SYNTAXES["mistral"])
    text = '[TOOL_CALLS]light[CALL_ID]abc123DEF[ARGS]{"room": "hall"}[TOOL_CALLS]dim[ARGS]{"by": 2}'
    for size in (1, 4, 1000):
        assert read(syntax, in_pieces(text, size), TOOLS)["calls"] == [LIGHT, ("dim", {"by": 2})]


def test_every_format_that_can_be_read_is_found_in_a_template():
    assert {*EXTRACTORS} - {"ling"} == {*SYNTAXES} - {"deepseek"}  # ling's calls are written as qwen's


@pytest.mark.parametrize("name", [name for name in names() if load(name).tool_format in EXTRACTORS])
def test_the_calls_of_a_named_template_are_found(name: str):
    template = load(name)
    syntax = call_syntax_of(template.source)
    assert syntax is not None and syntax.format == {"ling": "qwen"}.get(template.tool_format, template.tool_format)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("version", ["3", "3.1"])
def test_deepseek_s_calls_follow_its_thought_and_text(version: str, size: int):
    syntax = OutputSyntax.of("<think> <｜tool▁call▁begin｜>", prompt="<｜Assistant｜><think>\n", tools=True)
    text = f"hm</think>\n\nSure.{deepseek(CALLS, version=version)}"
    found = read(syntax, in_pieces(text, size), TOOLS)
    assert found == {"content": "Sure.", "reasoning": "hm", "calls": [(call["name"], call["arguments"]) for call in CALLS]}
    parser = OutputParser(OutputSyntax(SYNTAXES["deepseek"]), TOOLS)
    told = parser.push(
        deepseek(CALLS[:1], version=version)[: 30 + len("<｜tool▁calls▁begin｜>") + len("<｜tool▁call▁begin｜>") + 10]
    )
    assert [part.text for part in told if part.kind == "call"] == ["light"]


def test_a_tool_that_is_named_as_deepseek_s_type_of_calls_is_called():
    call = {"name": "function", "arguments": {"x": 1}}
    for version in ("3", "3.1"):
        assert read(OutputSyntax(SYNTAXES["deepseek"]), [deepseek([call], version=version)])["calls"] == [("function", {"x": 1})]
