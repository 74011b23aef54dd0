"""Whether a rendered text contains all of its row: contents, reasoning, tool calls and tools.

Two checks: which parts a template writes at all, once per shape of conversation, with placeholders for the texts; and whether
this row's texts are in its rendered text, each answer in its own turn. White space and escapes are ignored, because templates
trim and indent, and write arguments as JSON or between tags.

Reasoning is required only in trained messages: many templates leave out that of earlier messages, as in generation.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_llm.data.dropped import BadRow, RefusedRow
from raytune_llm.data.templates.tool_calls import function_of, name_and_arguments
from raytune_llm.records import Message

CONTENT, THOUGHT, CALLS, TOOLS = "content", "thought", "calls", "tools"
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which chat templates look for its reasoning, in transformers' order."""
SWITCHES = re.compile(r"/(no_)?think\b|/system_override\b")
"""Words in a text that templates treat as settings and remove."""
THOUGHT_WORDS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Lost:
    """A part of a row that is missing from its text."""

    what: str
    """CONTENT, THOUGHT, CALLS or TOOLS."""
    detail: str


def lost(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    row_messages: Sequence[Message],
    tools: Sequence[Any],
    turns: Mapping[int, tuple[int, int]],
    thought_words: Sequence[str] = THOUGHT_WORDS,
) -> Lost | None:
    """The first part of the row that is missing from the text, if any.

    row_messages: the messages of the row. messages: the same ones in the form that the template gets. turns: index of an
    answer's message -> its (start, end) in the text, in characters.
    """
    whole = _squeezed(text)
    spans = {number: _squeezed(text[start:end]) for number, (start, end) in turns.items()}
    elsewhere: Counter[str] = Counter()
    for number, (message, plain) in enumerate(zip(row_messages, messages, strict=True)):
        place = spans.get(number, whole)
        content = plain.get("content")
        if isinstance(content, str) and (needle := _squeezed(content)):
            elsewhere[needle] += 1
            enough = elsewhere[needle] if place is whole else 1
            if place.count(needle) < enough and (part := _missing_of_content(place, content, message, thought_words)):
                return Lost(part, f"{message.role}: {_shown(content)}")
        if message.trained and message.reasoning is not None and not _has_text(place, _thought_of(plain) or message.reasoning):
            return Lost(THOUGHT, _shown(message.reasoning))
        for call in plain.get("tool_calls") or (plain.get("function_call"),):
            if call and (detail := _missing_of_call(place, call)):
                return Lost(CALLS, detail)
    for tool in tools:
        if detail := _missing_of_tool(whole, tool):
            return Lost(TOOLS, detail)
    return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _has_text(place: str, text: str) -> bool:
    """Whether `place`, without white space, has the text as it is or escaped for JSON or HTML."""
    return any(_squeezed(skeleton) in place for skeleton in _skeletons(text))


def _skeletons(text: str) -> Iterator[str]:
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield html.escape(text)


def _missing_of_content(place: str, content: str, message: Message, thought_words: Sequence[str]) -> str | None:
    """CONTENT or THOUGHT, if one of them is missing."""
    if _has_text(place, content) or _has_text(place, SWITCHES.sub("", content)):
        return None
    *thoughts, said = re.split("|".join(re.escape(word.strip()) for word in thought_words), content)
    if message.role != "assistant" or not thoughts or not _has_text(place, said):
        return CONTENT
    return THOUGHT if message.trained and not all(_has_text(place, thought) for thought in thoughts) else None


def _thought_of(plain: Mapping[str, Any]) -> str | None:
    return next((plain[key] for key in REASONING if isinstance(plain.get(key), str)), None)


def _missing_of_call(place: str, call: Any) -> str | None:
    name, arguments = name_and_arguments(call)
    if not _has_text(place, name):
        return f"the call of {name}"
    written = function_of(call).get("arguments")
    if isinstance(written, str) and _has_text(place, written):
        return None
    if arguments and _squeezed(str(arguments)) in place and _squeezed(json.dumps(arguments, ensure_ascii=False)) not in place:
        return f"the arguments of {name} as JSON: {_shown(str(arguments))} is Python's way to write them"
    absent = next((leaf for leaf in _leaves(arguments) if not _has_leaf(place, leaf)), None)
    return None if absent is None else f"{_shown(str(absent))} of the arguments of {name}"


def _leaves(value: Any) -> Iterator[Any]:
    """All keys, strings and numbers in a JSON value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _has_leaf(place: str, leaf: Any) -> bool:
    if isinstance(leaf, str):
        # A text of JSON within a text of JSON is escaped twice.
        return _has_text(place, leaf) or _has_text(place, json.dumps(leaf, ensure_ascii=False)[1:-1])
    return json.dumps(leaf) in place or str(leaf) in place


def _missing_of_tool(whole: str, tool: Any) -> str | None:
    function = function_of(tool)
    for key in ("name", "description"):
        if isinstance(text := function.get(key), str) and not _has_text(whole, text):
            return f"the {key} of a tool: {_shown(text)}"
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    names = properties if isinstance(properties, Mapping) else ()
    absent = next((name for name in names if not _has_text(whole, str(name))), None)
    return None if absent is None else f"the parameter {absent} of a tool"


def probe(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, tuple[str, int]]]:
    """The conversation with placeholders for its texts: messages, tools, and placeholder -> (part, index of the message)."""
    placed: dict[str, tuple[str, int]] = {}

    def place(what: str, number: int) -> str:
        text = f"zq{len(placed):04}qz"
        placed[text] = (what, number)
        return text

    probes = []
    for number, message in enumerate(messages):
        probed = dict(message)
        if probed.get("content"):
            probed["content"] = place(CONTENT, number)
        if _thought_of(message) is not None:
            text = place(THOUGHT, number)
            probed |= {key: text for key in REASONING if isinstance(message.get(key), str)}
        if message.get("tool_calls"):
            probed["tool_calls"] = [_probe_call(call, place, number) for call in message["tool_calls"]]
        probes.append(probed)
    if not tools:
        return probes, [], placed
    function = function_of(tools[0])
    parameter = {"type": "string", "description": "a parameter"}
    declared: dict[str, Any] = {key: place(TOOLS, -1) for key in ("name", "description") if isinstance(function.get(key), str)}
    if "parameters" in function:
        declared["parameters"] = {"type": "object", "properties": {"parameter": parameter}, "required": ["parameter"]}
    return probes, [declared if function is tools[0] else {**tools[0], "function": declared}], placed


def _probe_call(call: Mapping[str, Any], place: Any, number: int) -> dict[str, Any]:
    function = function_of(call)
    arguments: Any = {"argument": place(CALLS, number)}
    arguments = json.dumps(arguments) if isinstance(function.get("arguments"), str) else arguments
    probed = {**function, "name": place(CALLS, number), "arguments": arguments}
    return probed if function is call else {**call, "function": probed}


def shape_of(messages: Sequence[Mapping[str, Any]], row_messages: Sequence[Message], tools: Sequence[Any]) -> tuple[Any, ...]:
    """All that a template's output can depend on, but for the texts: roles, keys, and which parts are empty."""
    return (
        tuple(
            (
                message.role,
                message.trained,
                tuple((key, None if value is None else bool(value)) for key, value in plain.items()),
                tuple((*call, type(function_of(call).get("arguments"))) for call in plain.get("tool_calls") or ()),
            )
            for message, plain in zip(row_messages, messages, strict=True)
        ),
        tuple(function_of(tools[0])) if tools else (),
    )


def lost_of_shape(text: str, placed: Mapping[str, tuple[str, int]], row_messages: Sequence[Message]) -> Lost | None:
    """The part of the first placeholder that is missing from the text."""
    for probed, (what, number) in placed.items():
        if probed not in text and (what != THOUGHT or row_messages[number].trained):
            return Lost(what, "" if number < 0 else f"{row_messages[number].role}: {_shown(row_messages[number].content)}")
    return None


def refusal(lost: Lost, template: str, other: str) -> RefusedRow | BadRow:
    """The error for a text that lacks a part of its row. template: the one in use; other: one to suggest."""
    named = f"the chat template of {template}" if "=" not in template else template
    detail = f" ({lost.detail})" if lost.detail else ""
    choose = f"data.template={other}, or model.tokenizer to one whose template writes them."
    if lost.what == TOOLS:
        fix = f"Set {choose} data.format.tools=null leaves them out."
        return RefusedRow(f"{named} does not write the row's tools{detail}", fix)
    if lost.what == CALLS:
        return RefusedRow(f"{named} does not write the row's tool calls{detail}", f"Set {choose}")
    if lost.what == THOUGHT:
        fix = f"Set data.reasoning=drop, which leaves them out, {choose}"
        return RefusedRow(f"{named} does not write the row's thoughts{detail}", fix)
    return BadRow(f"{named} leaves out a part of a message; set data.template={other}, for example", lost.detail)
