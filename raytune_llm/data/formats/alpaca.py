"""Alpaca's format: a row is one prompt and its answer, with an optional history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats.columns import (
    Reading,
    Row,
    judged,
    margin_of,
    media_of,
    optional,
    optional_text,
    required,
    shown,
    system_of,
    text_of,
    tools_of,
)
from raytune_llm.records import Conversation, Message, Pair, Record

if TYPE_CHECKING:
    from raytune_llm.config.data import AlpacaFormat


def alpaca(row: Row, columns: AlpacaFormat, reading: Reading) -> Record:
    """The history's [prompt, answer] pairs, then the prompt with its input on a new line, then the answer.

    Every answer is trained. If the output is not text, the row is only a prompt. A history that is not a list of pairs of texts
    makes the row unusable, since its meaning is unknown (LLaMA-Factory ignores such a history); null and an empty text mean none.
    """
    requested = text_of(required(row, "instruction", columns.instruction), columns.instruction)
    context = optional_text(row, columns.input)
    tools = optional(row, columns.tools)
    turns = [*system_of(optional_text(row, columns.system), tools)]
    history = optional(row, columns.history)
    if history is None or history == "":
        history = ()
    if not isinstance(history, list | tuple):
        raise BadRow(f"{columns.history} must be a list of [prompt, answer] pairs", shown(history))
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{columns.history} must be a list of [prompt, answer] pairs", shown(pair))
        turns.append(Message("user", text_of(pair[0], f"{columns.history}")))
        turns.append(Message("assistant", text_of(pair[1], f"{columns.history}"), trained=True))
    turns.append(Message("user", "\n".join(part for part in (requested, context) if part)))
    prompt_only = Conversation(tuple(turns), tools_of(tools), media_of(row, columns, reading))
    if columns.chosen is not None and columns.rejected is not None:
        sides = [required(row, "chosen", columns.chosen), required(row, "rejected", columns.rejected)]
        for side in sides:
            text_of(side, "an answer of a pair")
        chosen, rejected = ((Message("assistant", side, trained=True),) for side in sides)
        return Pair(prompt_only, chosen, rejected, margin_of(row, columns.margin, reading))
    if columns.output is None:
        return prompt_only
    answer = required(row, "output", columns.output)
    if not isinstance(answer, str):
        return prompt_only
    answered = replace(prompt_only, messages=(*turns, Message("assistant", answer, trained=True)))
    return judged(answered, optional(row, columns.label), reading)
