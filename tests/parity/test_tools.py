"""The thirteen tool formats against recorded LLaMA-Factory 0.9.5 texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from typing import Any

import jinja2
import pytest

from raytune_llm.data.templates.tool_calls import EXTRACTORS, extract_calls, parse_call_turn, render_calls, render_tools
from tests.parity.sets import recorded

READ_HERE = {
    "default/extract/dash_name": [["my-tool", "{}"]],
    "gemma4/extract/colon_in_string": [["f", '{"u": "see, key: value"}']],
    "seed_oss/extract/spaces": [["f", '{"s": " a b "}']],
    "seed_oss/extract/two": [["f", "{}"], ["g", "{}"]],
}
"""Rows without a defect mark that follow from one all the same: what was recorded is not the call that was written."""


def rows(direction: str, *, defect: bool) -> Iterator[Any]:
    for row in recorded("tools"):
        if row["direction"] == direction and ("defect" in row) == defect:
            yield pytest.param(row, id=row["id"])


def called(row: dict[str, Any]) -> str:
    text, calls = parse_call_turn(row["content"], thought=row["thought_words"], call_words=row["tool_call_words"])
    return text + render_calls(row["tool_format"], calls)


@pytest.mark.parametrize("row", rows("render_tools", defect=False))
def test_tools_are_declared_in_the_recorded_words(row):
    today = f"{date.fromisoformat(row['now']):%d %b %Y}" if "now" in row else None
    if isinstance(row["expected"], str):
        assert render_tools(row["tool_format"], json.loads(row["tools"]), date=today) == row["expected"]
    else:
        with pytest.raises((ValueError, jinja2.TemplateError)):
            render_tools(row["tool_format"], json.loads(row["tools"]), date=today)


@pytest.mark.parametrize("row", rows("render_calls", defect=False))
def test_calls_are_written_in_the_recorded_words(row):
    if isinstance(row["expected"], str):
        assert called(row) == row["expected"]
    else:
        with pytest.raises((ValueError, jinja2.TemplateError)):
            called(row)


@pytest.mark.parametrize("row", rows("extract", defect=False))
def test_calls_are_read_as_recorded(row):
    calls = extract_calls(row["tool_format"], row["text"])
    assert (calls if isinstance(calls, str) else [list(call) for call in calls]) == READ_HERE.get(row["id"], row["expected"])


@pytest.mark.parametrize("row", rows("render_calls", defect=True))
def test_calls_that_were_written_wrongly_can_be_read_back_here(row):
    try:
        _, calls = parse_call_turn(row["content"], thought=row["thought_words"], call_words=row["tool_call_words"])
    except ValueError:
        assert isinstance(row["expected"], dict)
        return
    read = extract_calls(row["tool_format"], called(row))
    if row["id"] in ("lfm2/render_calls/dotted_name", "seed_oss/render_calls/empty_list"):
        assert read == called(row), "nothing to read: no Python name, no call"
    else:
        assert isinstance(read, list)
        assert [(call.name, _typed(json.loads(call.arguments))) for call in read] == [
            (call["name"], _typed(call["arguments"])) for call in calls
        ]


def _typed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Formats that write strings bare can't tell "42" from 42."""
    return {
        key: json.loads(value) if isinstance(value, str) and value.isdigit() and value[0] != "0" else value
        for key, value in arguments.items()
    }


@pytest.mark.parametrize("row", rows("extract", defect=True))
def test_what_could_not_be_read_is_read_here(row):
    read = extract_calls(row["tool_format"], row["text"])
    if isinstance(row["expected"], dict):
        assert read == row["text"]
    else:
        assert not isinstance(read, str)
        assert all(isinstance(json.loads(call.arguments), dict) for call in read)


@pytest.mark.parametrize("tool_format", EXTRACTORS)
@pytest.mark.parametrize(
    "text", ["", "3", '"hi"', "[]", "null", "{", "Action: f\nAction Input: [", "<tool_call></tool_call>", "[[[[", "a\nb"]
)
def test_reading_never_raises(tool_format, text):
    assert extract_calls(tool_format, text) == text or extract_calls(tool_format, text) == []
