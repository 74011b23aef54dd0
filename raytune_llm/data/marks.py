"""Marks that a text carries through a chat template: where it is to be cut, and words that only look like control tokens.

A control token that somebody typed must not end a turn. So it is hidden behind a mark while the conversation is rendered, put
back afterwards, and encoded letter by letter: the model sees what was typed, and no control token.

Marks are noncharacters of Unicode, which text has no business to hold; where it does, they are hidden like control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CUT = "\ufdd2"
_HIDDEN = re.compile("\ufdd0(\\d+)\ufdd1")
_MARK = re.compile(f"{_HIDDEN.pattern}|{CUT}")


def forgeable(tokens: Iterable[str]) -> re.Pattern[str]:
    """What `hide` looks for: these tokens, the longest first, and the marks themselves."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, longest_first), "[\ufdd0-\ufdd2]"]))


def hide(value: Any, tokens: re.Pattern[str], hidden: list[str]) -> Any:
    """The text, or the value with all texts in it, with a mark for each token; these are added to `hidden`."""
    if isinstance(value, str):

        def mark(found: re.Match[str]) -> str:
            hidden.append(found.group())
            return f"\ufdd0{len(hidden) - 1}\ufdd1"

        return tokens.sub(mark, value) if tokens.search(value) else value
    if isinstance(value, dict):
        return {hide(key, tokens, hidden): hide(item, tokens, hidden) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, tokens, hidden) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Settled:
    """A text without marks. Positions are characters of it."""

    text: str
    cuts: tuple[int, ...]
    plain: tuple[tuple[int, int], ...]
    """Ranges that were hidden."""
    positions: tuple[int, ...]


def settle(text: str, hidden: Sequence[str], positions: Sequence[int]) -> Settled:
    """Take the marks out. `positions`, ascending, are carried over; one within a mark would be a bug."""
    pieces: list[str] = []
    cuts: list[int] = []
    plain: list[tuple[int, int]] = []
    moved: list[int] = []
    length = at = passed = 0

    def carry(until: int) -> None:
        nonlocal passed
        while passed < len(positions) and positions[passed] <= until:
            moved.append(length + positions[passed] - at)
            passed += 1

    for mark in _MARK.finditer(text):
        carry(mark.start())
        pieces.append(text[at : mark.start()])
        length += mark.start() - at
        if mark[1] is None:
            cuts.append(length)
        else:
            word = hidden[int(mark[1])]
            pieces.append(word)
            plain.append((length, length + len(word)))
            length += len(word)
        at = mark.end()
    carry(len(text))
    pieces.append(text[at:])
    return Settled("".join(pieces), tuple(cuts), tuple(plain), tuple(moved))
