"""{role, content} messages, in any order that the chat template takes: whole conversations, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats.columns import (
    Reading,
    Row,
    as_written,
    calls_of,
    checked_call,
    judged,
    margin_of,
    media_of,
    optional,
    reasoning_of,
    required,
    shown,
    text_of,
    tools_of,
    weight_of,
)
from raytune_llm.records import Conversation, Message, Pair, Record, Role

if TYPE_CHECKING:
    from raytune_llm.config.data import ChatFormat, Columns, PromptCompletionFormat

ROLES = get_args(Role)


def chat(row: Row, columns: ChatFormat, reading: Reading) -> Record:
    """{role, content} messages, as in OpenAI's API, in any order that the chat template accepts.

    Every answer is trained, with its weight if it has one; `train: false` and `weight: 0` leave it out. Each side of a pair is a
    text, a message, or a list of messages, either with the prompt or without it.
    """
    turns: tuple[Message, ...] = ()
    images: list[Any] | None = None if columns.images is None else []
    ranked = columns.chosen is not None and columns.rejected is not None
    if columns.messages is not None and not (ranked and row.get(columns.messages) is None):
        turns = _messages(required(row, "messages", columns.messages), columns.messages, images)
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system message must come first")
    record = _judged_or_pair(row, columns, reading, turns, images)
    if isinstance(record, Conversation) and not turns:
        raise BadRow("there are no messages")
    return record


def prompt_completion(row: Row, columns: PromptCompletionFormat, reading: Reading) -> Record:
    """A prompt and its completion, each a text or a list of messages. Every answer of the completion is trained."""
    images: list[Any] | None = None if columns.images is None else []
    prompt = required(row, "prompt", columns.prompt)
    turns = (Message("user", prompt),) if isinstance(prompt, str) else _messages(prompt, columns.prompt, images)
    turns = tuple(replace(turn, trained=False) for turn in turns)
    if columns.completion is not None and columns.chosen is None:
        turns += _side(required(row, "completion", columns.completion), columns.completion, images)
    return _judged_or_pair(row, columns, reading, turns, images)


def _judged_or_pair(row: Row, columns: Columns, reading: Reading, turns: tuple[Message, ...], images: list[Any] | None) -> Record:
    """The record of these turns with the row's tools and media: a Pair if the row has two answers, a Labeled answer if it has a
    verdict, else a Conversation."""
    tools = tools_of(optional(row, columns.tools))

    def conversation() -> Conversation:
        media = media_of(row, columns, reading)
        return Conversation(turns, tools, replace(media, images=(*media.images, *(images or ()))))

    if columns.chosen is None or columns.rejected is None:
        return judged(conversation(), optional(row, columns.label), reading)
    sides = [
        _side(required(row, setting, name), name, images)
        for setting, name in (("chosen", columns.chosen), ("rejected", columns.rejected))
    ]
    return _pair(conversation(), sides[0], sides[1], margin_of(row, columns.margin, reading))


def _messages(column: Any, name: str, images: list[Any] | None) -> tuple[Message, ...]:
    """The messages in a column. Images within them are appended to `images`."""
    if not isinstance(column, list) or not column:
        raise BadRow(f"{name} must be a list of messages", shown(column))
    return tuple(_message(message, images) for message in column)


def _message(message: Any, images: list[Any] | None) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow("a message must be an object with role and content", shown(message))
    role: Any = message.get("role")
    role = "tool" if role == "function" else role  # the result of a function_call
    if role not in ROLES:
        raise BadRow(f"a message's role must be one of {', '.join(ROLES)}", f"got {shown(role)}")
    written = as_written(message, role)
    calls = list(calls_of(message))
    content, reasoning = message.get("content"), reasoning_of(message)
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content, thoughts = _joined(content, calls, images)
        reasoning = thoughts if reasoning is None else reasoning
        written |= {"content": content}
        written |= {"reasoning_content": reasoning} if thoughts is not None else {}
        written |= {"tool_calls": calls} if calls else {}
    weight = weight_of(message)
    return Message(
        role=role,
        content=text_of(content, "a message's content"),
        trained=role == "assistant" and weight > 0,
        weight=weight,
        reasoning=reasoning,
        tool_calls=tuple(calls),
        written=written,
    )


def _joined(parts: Sequence[Any], calls: list[Any], images: list[Any] | None) -> tuple[str, str | None]:
    """The text and the reasoning of a content in typed parts. Calls and images are appended to the lists. An image leaves a
    placeholder in the text, unless `images` is None (data.format.images=null)."""
    said, thoughts = "", None
    for part in parts:
        if not isinstance(part, Mapping):
            raise BadRow("a part of a message's content must be an object with a type", shown(part))
        value = part.get(str(part.get("type")), part.get("value"))
        match part.get("type"):
            case "text":
                said += text_of(value, "a text part")
            case "reasoning" | "thinking":
                thoughts = (thoughts or "") + text_of(value, "a reasoning part")
            case "tool_call":
                calls += [checked_call(call) for call in _parsed(value)]
            case "image" | "image_url":
                if images is not None:
                    said += "<image>"
                    images.append(value.get("url") if isinstance(value, Mapping) else value)
            case other:
                raise BadRow("a part of a message's content has a type that is not read", f"got {shown(other)}")
    return said, thoughts


def _parsed(value: Any) -> list[Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise BadRow("a tool_call part must be JSON", shown(value)) from None
    return parsed if isinstance(parsed, list) else [parsed]


def _side(side: Any, name: str, images: list[Any] | None) -> tuple[Message, ...]:
    """One side of a pair, or a completion: a text, a message or a list of messages."""
    if isinstance(side, str):
        return (Message("assistant", side, trained=True),)
    return _messages([side] if isinstance(side, Mapping) else side, name, images)


def _pair(shared: Conversation, chosen: tuple[Message, ...], rejected: tuple[Message, ...], margin: float) -> Pair:
    """The pair of two conversations: the messages that they share are the prompt, and each adds one answer."""
    start = len(shared.messages)
    if not start or chosen[:start] != shared.messages or rejected[:start] != shared.messages:
        chosen, rejected = (*shared.messages, *chosen), (*shared.messages, *rejected)
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    prompt, answers = chosen[:common], (chosen[common:], rejected[common:])
    if not prompt:
        raise BadRow("both sides of a pair must answer the same prompt")
    for answer in answers:
        if len(answer) != 1 or answer[0].role != "assistant":
            raise BadRow(
                "each side of a pair must add one answer to the shared prompt", f"roles {[turn.role for turn in answer]}"
            )
    prompt = tuple(replace(message, trained=False) for message in prompt)
    chosen, rejected = ((replace(answer, trained=True),) for (answer,) in answers)
    return Pair(replace(shared, messages=prompt), chosen, rejected, margin)
