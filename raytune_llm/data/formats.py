"""A raw row -> a record. Which messages are trained is decided here and nowhere else.

A format is a function from a row and the names of its columns to a Record, raising BadRow. To add one: the function and its
entry in FORMATS, its section in config/data.py, and conf/data/<name>.yaml.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from raytune_llm.data.dropped import BadRow
from raytune_llm.records import Conversation, Message, Record, Role

if TYPE_CHECKING:
    from raytune_llm.config.data import FormatConfig

Row = Mapping[str, Any]
ROLES = get_args(Role)


def converter(format: FormatConfig) -> Callable[[Row], Record]:
    """The function that makes a record of each row, or raises BadRow."""
    columns = dataclasses.asdict(format)
    return functools.partial(FORMATS[columns.pop("name")], **columns)


def convert(row: Row, format: FormatConfig) -> Record:
    return converter(format)(row)


def chat(row: Row, *, messages: str, tools: str | None) -> Conversation:
    """{role, content} messages, as OpenAI's API takes them.

    Every answer is trained, save those that say `train: false` or `weight: 0`.
    """
    column = _required(row, "messages", messages)
    if not isinstance(column, list) or not column:
        raise BadRow(f"{messages} must be a list of messages", _shown(column))
    turns = tuple(_message(message) for message in column)
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system message must come first")
    return _trainable(Conversation(turns, tools=_tools(row.get(tools)) if tools else ()))


def alpaca(
    row: Row, *, instruction: str, input: str | None, output: str, system: str | None, history: str | None
) -> Conversation:
    """One request, with its input on a new line, and its answer; before it, [request, answer] pairs of history.

    Every answer is trained.
    """
    requested = _text(_required(row, "instruction", instruction), instruction)
    answer = _text(_required(row, "output", output), output)
    context = _optional_text(row, input)
    turns: list[Message] = []
    if prompt := _optional_text(row, system):
        turns.append(Message("system", prompt))
    for pair in _optional(row, history) or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{history} must be a list of [request, answer] pairs", _shown(pair))
        turns.append(Message("user", _text(pair[0], f"{history}")))
        turns.append(Message("assistant", _text(pair[1], f"{history}"), trained=True))
    turns.append(Message("user", "\n".join(part for part in (requested, context) if part)))
    turns.append(Message("assistant", answer, trained=True))
    return Conversation(tuple(turns))


FORMATS: dict[str, Callable[..., Record]] = {"chat": chat, "alpaca": alpaca}


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow("a message must be an object with role and content", _shown(message))
    role: Any = message.get("role")
    if role not in ROLES:
        raise BadRow(f"a message's role must be one of {', '.join(ROLES)}", f"got {_shown(role)}")
    calls = tuple(_call(call) for call in message.get("tool_calls") or ())
    content = message.get("content")
    if content is None and calls:
        content = ""
    reasoning = message.get("reasoning_content")
    return Message(
        role=role,
        content=_text(content, "a message's content"),
        trained=role == "assistant" and _is_trained(message),
        reasoning=None if reasoning is None else _text(reasoning, "a message's reasoning_content"),
        tool_calls=calls,
    )


def _is_trained(message: Row) -> bool:
    for flag in ("train", "weight"):
        value = message.get(flag)
        if value is not None and value not in (0, 1):
            raise BadRow(f"a message's {flag} must be 0 or 1", f"got {_shown(value)}")
        if value is not None:
            return bool(value)
    return True


def _call(call: Any) -> dict[str, Any]:
    """{name, arguments}, also where it is wrapped as {type: function, function: {...}} or holds its arguments as JSON text."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadRow("a tool call must have a name", _shown(call))
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            raise BadRow("a tool call's arguments must be a JSON object", _shown(call)) from None
    if not isinstance(arguments or {}, Mapping):
        raise BadRow("a tool call's arguments must be a JSON object", _shown(call))
    return {"name": call["name"], "arguments": dict(arguments or {})}


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRow("the tools must be a JSON list", _shown(tools)) from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("the tools must be a list of objects", _shown(tools))
    return tuple(tools)


def _trainable(conversation: Conversation) -> Conversation:
    if not any(turn.role == "assistant" for turn in conversation.messages):
        raise BadRow("there is no assistant message")
    if not any(turn.trained for turn in conversation.messages):
        raise BadRow("no assistant message is trained")
    return conversation


def _required(row: Row, setting: str, column: str) -> Any:
    if not isinstance(row, Mapping):
        raise BadRow("a row must be an object", _shown(row))
    if column not in row:
        raise BadRow(f"there is no column {column!r} (data.format.{setting})", f"there are {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _optional(row: Row, column: str | None) -> Any:
    return None if column is None else row.get(column)


def _optional_text(row: Row, column: str | None) -> str:
    value = _optional(row, column)
    return "" if value is None else _text(value, f"{column}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text", f"got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
