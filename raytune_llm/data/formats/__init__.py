"""Converts raw rows to records. Only this folder decides which messages are trained.

A format is a function from a row and its section of the config (the names of its columns) to a Record, raising BadRow. To add
one: the function in a file here and its entry in FORMATS, its section in config/data.py, and conf/data/<name>.yaml.

The columns of a row decide its type: with `chosen` and `rejected` it is a Pair, with a true or false `label` a Labeled answer,
else a Conversation, which may lack an answer if only prompts are wanted.

`sharegpt`, `openai` and `alpaca` follow LLaMA-Factory's rules for order and for values of the wrong type. These differ: "detailed
thinking off" is not added to system texts; text beside tool calls, and tool results at the end, are kept; parallel tool results
stay separate; and a row with an unknown role, a wrong role in an answer or a history of the wrong type is dropped and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats.alpaca import alpaca
from raytune_llm.data.formats.columns import Reading, Row, required, shown, text_of
from raytune_llm.data.formats.messages import chat, prompt_completion
from raytune_llm.data.formats.tagged import openai, sharegpt
from raytune_llm.data.templates.kept import REASONING
from raytune_llm.records import Message, Record, Text, with_messages

if TYPE_CHECKING:
    from raytune_llm.config.data import FormatConfig, TextFormat


ROW_ALONE = Reading()
"""Reads a row by its columns only."""


def converter(format: FormatConfig, reading: Reading = ROW_ALONE) -> Callable[[Row], Record]:
    """The function that converts a row to a record, or raises BadRow."""
    return functools.partial(convert, format=format, reading=reading)


def convert(row: Row, format: FormatConfig, reading: Reading = ROW_ALONE) -> Record:
    if not isinstance(row, Mapping):
        raise BadRow("a row must be an object", shown(row))
    record = FORMATS[format.name](row, format, reading)
    if not reading.drop_thoughts:
        return record
    return with_messages(record, functools.partial(_without_thought, thought=reading.thought))


def _without_thought(message: Message, thought: tuple[str, str]) -> Message:
    """The answer without its reasoning."""
    if message.role != "assistant":
        return message
    _, ends, said = message.content.rpartition(thought[1].strip())
    written = {key: value for key, value in (message.written or {}).items() if key not in REASONING}
    return replace(message, content=said.lstrip() if ends else message.content, reasoning=None, written=written or None)


def columns_of(format: FormatConfig) -> tuple[str, ...]:
    """The columns of a row that its format reads."""
    settings = asdict(format)
    return tuple(value for name, value in settings.items() if value is not None and name != "name" and not name.endswith("_tag"))


def text(row: Row, columns: TextFormat, reading: Reading) -> Text:
    return Text(text_of(required(row, "text", columns.text), columns.text))


FORMATS: dict[str, Callable[..., Record]] = {
    "chat": chat,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": openai,
    "prompt_completion": prompt_completion,
    "text": text,
}
