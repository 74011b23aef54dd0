"""Reads and checks the values that all formats take from a row: texts, tools, calls, media, verdicts and weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.templates.kept import REASONING
from raytune_llm.data.templates.tool_calls import name_and_arguments
from raytune_llm.records import Conversation, Labeled, Media, Message

if TYPE_CHECKING:
    from raytune_llm.config.data import Columns

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """Settings for reading a row, in addition to its columns."""

    media_dir: str | None = None
    """The folder in which relative paths of images, videos and audio files are looked up first."""
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    """The texts around reasoning, and around JSON tool calls, in a message of tool calls, as the chat template writes them."""
    drop_thoughts: bool = False
    """Leave out the reasoning of answers."""
    untyped: bool = False
    """Every value is text, as in csv: a label is true if it reads true or 1, and false if it reads false or 0."""


WRITTEN_LABELS = {"true": True, "1": True, "false": False, "0": False}


LARGEST = 3.4028234663852886e38
"""The largest float32, the type that weights and margins are kept in."""


def judged(conversation: Conversation, label: Any, reading: Reading) -> Conversation | Labeled:
    """A Labeled answer if the label is true or false, else the conversation."""
    if reading.untyped and isinstance(label, str):
        label = WRITTEN_LABELS.get(label.strip().lower())
    return Labeled(conversation, desirable=label) if isinstance(label, bool) else conversation


def margin_of(row: Row, column: str | None, reading: Reading) -> float:
    """The margin of a pair; 0 if the value is null. Raises BadRow if the row lacks the column."""
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
    """The system message, if any. An empty list of tools as JSON text gives an empty system message."""
    given = (isinstance(tools, str) and tools.strip()) or isinstance(tools, list)
    return (Message("system", text),) if text or (given and not tools_of(tools)) else ()


def tools_of(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        tools = _json(tools, "the tools must be a JSON list")
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if isinstance(tools, list):
        tools = [_json(tool, "a tool must be a JSON object") if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("the tools must be a list of objects", shown(tools))
    return tuple(tools)


def _json(text: str, rule: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(rule, shown(text)) from None


def media_of(row: Row, columns: Columns, reading: Reading) -> Media:
    return Media(*(_references(optional(row, name), reading) for name in (columns.images, columns.videos, columns.audios)))


def _references(column: Any, reading: Reading) -> tuple[Any, ...]:
    if not column:
        return ()
    return tuple(_reference(item, reading) for item in (column if isinstance(column, list) else [column]))


def _reference(item: Any, reading: Reading) -> Any:
    """One image, video or audio. A path is completed with media_dir if the file is there. A list has the frames of a video."""
    if isinstance(item, list):
        return [_reference(frame, reading) for frame in item]
    if isinstance(item, str) and reading.media_dir is not None:
        path = Path(reading.media_dir, item)
        with suppress(OSError):  # a data: URL is too long for a path
            if path.is_file():
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


WEIGHTS = ("train", "training", "trainable", "loss", "weight", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask")
"""Keys of a message that say whether an answer is trained (true, 1) or not (false, 0), or its weight in the loss: weight (OpenAI,
Mistral), loss_weight (LLaMA-Factory), training (axolotl), loss (ms-swift, xtuner), step_loss_mask (slime)."""
NO_WEIGHTS = ("mask", "train_detail", "training_detail", "train_on", "ignore_loss", "no_loss")
"""Keys that look like weights but are refused: their meaning is unknown, or they concern parts of an answer."""


def weight_of(message: Row) -> float:
    """The weight of an answer in the loss, 0 if it is not trained: the product of its WEIGHTS, and 0 for torchtune's `masked`."""
    weight = 1.0
    for key in (*WEIGHTS, "masked"):
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value <= LARGEST:
            raise BadRow(f"a message's {key} must be true, false or a number that is not negative", f"got {shown(value)}")
        weight *= not value if key == "masked" else value
    if weight > LARGEST:
        raise BadRow("the product of a message's weights must fit float32", f"got {weight:g}")
    unread = next((key for key in NO_WEIGHTS if message.get(key) is not None), None)
    if unread is not None:
        raise BadRow(f"a message's {unread} is not read", "use train: true or false, or weight")
    return float(weight)


def reasoning_of(message: Row) -> str | None:
    given = [(key, message[key]) for key in REASONING if message.get(key) is not None]
    texts = [text_of(value, f"a message's {key}") for key, value in given]
    if len({*texts}) > 1:
        raise BadRow("a message has several fields of reasoning", " and ".join(key for key, _ in given))
    return texts[0] if texts else None


def calls_of(message: Row) -> tuple[Mapping[str, Any], ...]:
    """The message's tool_calls (or its function_call, the older form) as they are written. Raises BadRow for an invalid call."""
    calls = message.get("tool_calls") or ()
    if not calls and message.get("function_call"):
        calls = [message["function_call"]]
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls must be a list", shown(calls))
    return tuple(checked_call(call) for call in calls)


def checked_call(call: Any) -> Mapping[str, Any]:
    try:
        name_and_arguments(call)
    except ValueError as error:
        raise BadRow(str(error), shown(call)) from None
    return call


def as_written(message: Row, role: str) -> dict[str, Any]:
    """The message for the chat template, with the keys that the row has. Nulls are left out, as in transformers, and so are keys
    that only concern training."""
    left_out = (*WEIGHTS, "masked", "role")
    return {"role": role, **{key: value for key, value in message.items() if key not in left_out and value is not None}}
