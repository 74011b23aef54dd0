"""Messages with configurable keys and role names, whose order is checked: ShareGPT's format and LLaMA-Factory's `openai`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats.columns import (
    Reading,
    Row,
    as_written,
    calls_of,
    judged,
    margin_of,
    media_of,
    optional,
    optional_text,
    reasoning_of,
    required,
    shown,
    system_of,
    text_of,
    tools_of,
    weight_of,
)
from raytune_llm.data.templates.tool_calls import parse_call_turn
from raytune_llm.records import Conversation, Message, Pair, Record

if TYPE_CHECKING:
    from raytune_llm.config.data import OpenAIFormat, ShareGPTFormat, Tags


def sharegpt(row: Row, columns: ShareGPTFormat, reading: Reading) -> Record:
    """User messages or tool results alternate with answers or tool calls, after an optional system message.

    A tool call is a message whose text is JSON. Every answer is trained, with its weight if it has one.
    """
    return _alternating(row, columns, reading, _tagged, several_results=False)


def openai(row: Row, columns: OpenAIFormat, reading: Reading) -> Record:
    """Like `sharegpt`, but an answer can have `tool_calls`, and several tool results can follow each other.

    Every answer is trained, with its weight if it has one.
    """
    return _alternating(row, columns, reading, _tagged_with_calls, several_results=True)


def _tagged(message: Any, columns: Tags, reading: Reading) -> Message:
    """One message by its tags. Raises BadRow for a role that the tags do not name."""
    if not isinstance(message, Mapping):
        raise BadRow(f"a message must be an object with {columns.role_tag} and {columns.content_tag}", shown(message))
    tag = message.get(columns.role_tag)
    content = message.get(columns.content_tag)
    roles = {
        columns.user_tag: "user",
        columns.observation_tag: "tool",
        columns.system_tag: "system",
        columns.assistant_tag: "assistant",
        columns.function_tag: "function",
    }
    role: Any = roles.get(tag) if isinstance(tag, str) else None
    if role is None:
        known = ", ".join(str(name) for name in roles if name is not None)
        raise BadRow(f"a message's {columns.role_tag} must be one of {known}", f"got {shown(tag)}")
    content = text_of(content, f"a message's {columns.content_tag}")
    weight = weight_of(message)
    if role != "function":
        calls_of(message)  # of another role's message only the template reads them
        return Message(
            role,
            content,
            trained=role == "assistant" and weight > 0,
            weight=weight,
            reasoning=reasoning_of(message),
            written=_written(message, role, content, columns),
        )
    try:
        said, calls = parse_call_turn(content, thought=reading.thought, call_words=reading.call_words)
    except ValueError as error:
        raise BadRow("a message of tool calls must be JSON with names and arguments", f"{error}: {shown(content)}") from None
    if not calls:
        raise BadRow("a message of tool calls holds none")
    return Message("assistant", said, trained=weight > 0, weight=weight, tool_calls=calls)


def _tagged_with_calls(message: Any, columns: Tags, reading: Reading) -> Message:
    """One message that may have both text and tool calls."""
    calls = calls_of(message) if isinstance(message, Mapping) else ()
    if calls and message.get(columns.role_tag) in (columns.assistant_tag, columns.function_tag):
        content = message.get(columns.content_tag)
        said = "" if content is None else text_of(content, f"a message's {columns.content_tag}")
        weight = weight_of(message)
        return Message(
            "assistant",
            said,
            trained=weight > 0,
            weight=weight,
            reasoning=reasoning_of(message),
            tool_calls=calls,
            written=_written(message, "assistant", content, columns),
        )
    read = _tagged(message, columns, reading)
    return replace(read, reasoning=reasoning_of(message)) if read.role == "assistant" else read


def _written(message: Mapping[str, Any], role: str, content: Any, columns: Tags) -> dict[str, Any]:
    """The message with the keys that chat templates read."""
    others = {key: value for key, value in message.items() if key not in (columns.role_tag, columns.content_tag)}
    return as_written({"content": content, **others}, role)


def _alternating(
    row: Row, columns: Tags, reading: Reading, read: Callable[[Any, Tags, Reading], Message], *, several_results: bool
) -> Record:
    """The record of messages in which prompts and answers alternate, with an answer as the last message."""
    column = required(row, "messages", columns.messages)
    if not isinstance(column, list):
        raise BadRow(f"{columns.messages} must be a list of messages", shown(column))
    messages = [read(message, columns, reading) for message in column]
    system = optional_text(row, columns.system)
    if messages and messages[0].role == "system":
        system = messages.pop(0).content
    if not messages:
        raise BadRow("there are no messages")
    told_last = False
    for earlier, message in zip([None, *messages], messages, strict=False):
        if message.role == "system":
            raise BadRow("a system message must come first")
        follows_result = several_results and earlier is not None and earlier.role == message.role == "tool"
        if not follows_result and (message.role != "assistant") == told_last:
            raise BadRow(
                "user messages or tool results must alternate with answers or tool calls", f"{message.role} is out of turn"
            )
        told_last = message.role != "assistant"
    tools = optional(row, columns.tools)
    conversation = Conversation((*system_of(system, tools), *messages), tools_of(tools), media_of(row, columns, reading))
    if columns.chosen is not None and columns.rejected is not None:
        if not told_last:
            raise BadRow("the messages before a pair of answers must end with a user message")
        sides = []
        for name in (columns.chosen, columns.rejected):
            side = required(row, name, name)
            answer = read(side, columns, reading)
            if answer.role != "assistant":
                raise BadRow("an answer of a pair must have the role of an answer", f"{name} is {shown(side)}")
            sides.append((replace(answer, trained=True),))
        chosen, rejected = sides
        return Pair(conversation, chosen, rejected, margin_of(row, columns.margin, reading))
    if told_last:
        raise BadRow("the messages must end with an answer")
    return judged(conversation, optional(row, columns.label), reading)
