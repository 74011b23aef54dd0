"""What all formats take from a row: texts, tools, calls, media and verdicts, each checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_llm.data.dropped import BadRow
from raytune_llm.records import Conversation, Labeled, Media, Message

if TYPE_CHECKING:
    from raytune_llm.config.data import Columns

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a row takes beyond its columns."""

    media_dir: str | None = None
    """Where a relative path of an image, video or audio is looked for first."""
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    """What encloses a thought, and JSON calls, in a message of tool calls: as the chat template writes them."""
    untyped: bool = False
    """Every value is a text, as in csv: a label is true where it reads true or 1, and false where it reads false or 0."""


WRITTEN_LABELS = {"true": True, "1": True, "false": False, "0": False}


LARGEST = 3.4028234663852886e38
"""In float32, which weights and margins are kept in."""


def judged(conversation: Conversation, label: Any, reading: Reading) -> Conversation | Labeled:
    """Labelled where the label is true or false; anything else is no label."""
    if reading.untyped and isinstance(label, str):
        label = WRITTEN_LABELS.get(label.strip().lower())
    return Labeled(conversation, desirable=label) if isinstance(label, bool) else conversation


def margin_of(row: Row, column: str | None, reading: Reading) -> float:
    """0 where the row does not say. A column that is asked for must be there."""
    value = None if column is None else required(row, "margin", column)
    if reading.untyped and isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            raise BadRow("a margin must be a number", f"got {shown(value)}") from None
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST:
        raise BadRow("a margin must be a number that is not negative", f"got {shown(value)}")
    return float(value)


def system_of(text: str, tools: Any) -> tuple[Message, ...]:
    """The system message, if any. Tools that are given but none (a JSON text of an empty list) make an empty one."""
    given = (isinstance(tools, str) and tools.strip()) or isinstance(tools, list)
    return (Message("system", text),) if text or (given and not tools_of(tools)) else ()


def tools_of(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("the tools must be a JSON list", shown(tools)) from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("the tools must be a list of objects", shown(tools))
    return tuple(tools)


def media_of(row: Row, columns: Columns, reading: Reading) -> Media:
    return Media(*(_references(optional(row, name), reading) for name in (columns.images, columns.videos, columns.audios)))


def _references(column: Any, reading: Reading) -> tuple[Any, ...]:
    if not column:
        return ()
    return tuple(_reference(item, reading) for item in (column if isinstance(column, list) else [column]))


def _reference(item: Any, reading: Reading) -> Any:
    """A path is that of a file in media_dir, if there is one; a list is the frames of a video."""
    if isinstance(item, list):
        return [_reference(frame, reading) for frame in item]
    if isinstance(item, str) and reading.media_dir is not None and (path := Path(reading.media_dir, item)).is_file():
        return str(path)
    return item


def required(row: Row, setting: str, column: str) -> Any:
    if column not in row:
        raise BadRow(f"there is no column {column!r} (data.format.{setting})", f"there are {', '.join(map(str, row)) or 'none'}")
    return row[column]


def optional(row: Row, column: str | None) -> Any:
    return None if column is None else row.get(column)


def optional_text(row: Row, column: str | None) -> str:
    value = optional(row, column)
    return "" if value is None else text_of(value, f"{column}")


def text_of(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text", f"got {shown(value)}")
    return value


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def weight_of(message: Row) -> float:
    """Of an answer in the loss, 0 where it is not trained: what `train`, `weight` and `loss_weight` say together."""
    weight = 1.0
    for flag in ("train", "weight", "loss_weight"):
        value = message.get(flag)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise BadRow(f"a message's {flag} must be true, false or a number that is not negative", f"got {shown(value)}")
        weight *= value
    if weight > LARGEST:
        raise BadRow("a message's weights must make a number that float32 holds", f"got {weight:g}")
    return weight


def reasoning_of(message: Row) -> str | None:
    reasoning = message.get("reasoning_content")
    return None if reasoning is None else text_of(reasoning, "a message's reasoning_content")


def calls_of(calls: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls must be a list", shown(calls))
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> dict[str, Any]:
    """{name, arguments}, also where it is wrapped as {type: function, function: {...}} or holds its arguments as JSON text."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadRow("a tool call must have a name", shown(call))
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow("a tool call's arguments must be a JSON object", shown(call)) from None
    if not isinstance(arguments or {}, Mapping):
        raise BadRow("a tool call's arguments must be a JSON object", shown(call))
    return {"name": call["name"], "arguments": dict(arguments or {})}
