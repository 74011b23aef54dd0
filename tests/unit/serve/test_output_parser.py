from __future__ import annotations

import json

import pytest

from raytune_llm.serve.output_parser import OutputParser, OutputPart, OutputSyntax

QWEN = OutputSyntax("qwen", "<tool_call>", ("<think>", "</think>"))
CALL = '<tool_call>\n{"name": "light", "arguments": {"room": "hall"}}\n</tool_call>'


def read(syntax: OutputSyntax, pieces: list[str], names: frozenset[str] | None = None) -> dict[str, list[str]]:
    reader = OutputParser(syntax, names)
    parts: list[OutputPart] = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    joined: dict[str, list[str]] = {"content": [], "reasoning": [], "call": []}
    for part in parts:
        joined[part.kind].append(part.text if part.call is None else f"{part.call.name} {json.loads(part.call.arguments)}")
    return joined


def in_pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("plain <b>text</b>", "plain <b>text</b>", "", []),
        ("<think>\nhm <tool\n</think>\n\nyes", "yes", "hm <tool", []),
        (f"Sure.\n{CALL}", "Sure.", "", ["light {'room': 'hall'}"]),
        (f"<think>\nlet me\n</think>\n\n{CALL}\n{CALL}", "", "let me", ["light {'room': 'hall'}"] * 2),
        (f"Sure.\n{CALL}\nDone, I hope.", "Sure.Done, I hope.", "", ["light {'room': 'hall'}"]),
        ("a < b and <tool", "a < b and <tool", "", []),
        ("<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", "", []),
        ("<think>\nnever ends", "", "never ends", []),
        ("say <think> twice", "say <think> twice", "", []),
    ],
)
def test_pieces_of_any_size_are_read_alike(size: int, text: str, content: str, reasoning: str, calls: list[str]):
    found = read(QWEN, in_pieces(text, size))
    assert ("".join(found["content"]), "".join(found["reasoning"]), found["call"]) == (content, reasoning, calls)


def test_text_is_told_as_it_comes():
    reader = OutputParser(QWEN)
    assert [part.text for piece in ("one ", "two <", "b> ") for part in reader.push(piece)] == ["one", " two", " <b>"]


def test_a_prompt_that_ends_in_a_thought_starts_the_answer_there():
    syntax = OutputSyntax.of("{{ '<think>' }}", prompt="<|im_start|>assistant\n<think>\n")
    assert read(syntax, ["why\n</think>\n\nso"]) == {"content": ["so"], "reasoning": ["why"], "call": []}


def test_a_call_of_an_unknown_tool_stays_text():
    assert read(QWEN, [CALL], frozenset({"other"}))["content"] == [CALL]


def test_without_tools_nothing_is_a_call():
    syntax = OutputSyntax.of("<tool_call>", tools=False)
    assert "".join(read(syntax, [CALL])["content"]) == CALL


def test_whole_answers_that_are_json_are_calls_of_formats_without_a_mark():
    syntax = OutputSyntax.of("<|python_tag|>", tools=True)
    assert read(syntax, ['{"name": "f", ', '"parameters": {"a": 1}}'])["call"] == ["f {'a': 1}"]
    assert "".join(read(syntax, ["just ", "text"])["content"]) == "just text"
