"""Placeholders that a text carries through a chat template: cuts, and typed text that only resembles control tokens.

A control token that somebody typed must not end a turn. So it is replaced by a placeholder while the conversation is rendered,
restored afterwards, and encoded character by character: the model sees what was typed, and no control token.

Placeholders are Unicode noncharacters. If a text contains some, they are escaped like control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

CUT = "\ufdd2"
PLACEHOLDER = re.compile(f"\ufdd0(\\d+)\ufdd1|{CUT}")
"""Escaped text, by its number, or a cut."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """What `escape` searches for."""

    pattern: re.Pattern[str]
    first_characters: str
    """A text without any of these has no control tokens, which is much faster to check."""

    def is_in(self, text: str) -> bool:
        return self._may_be_in(text) and self.pattern.search(text) is not None

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        return self.pattern.finditer(text) if self._may_be_in(text) else iter(())

    def sub(self, replaced: Callable[[re.Match[str]], str], text: str) -> str:
        return self.pattern.sub(replaced, text) if self._may_be_in(text) else text

    def _may_be_in(self, text: str) -> bool:
        return any(map(text.__contains__, self.first_characters))


def control_tokens(tokens: Iterable[str]) -> ControlTokens:
    """These tokens, the longest first, and the placeholders' own characters."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, longest_first), "[\ufdd0-\ufdd2]"]))
    return ControlTokens(pattern, "".join(sorted({token[0] for token in longest_first})) + "\ufdd0\ufdd1\ufdd2")


def placeholder(number: int, digits: int = 1) -> str:
    """The placeholder for escaped text `number`, with at least `digits` digits."""
    return f"\ufdd0{number:0{digits}}\ufdd1"


def escape(value: Any, tokens: ControlTokens, escaped: list[str]) -> Any:
    """The value with a placeholder for each control token in its texts; the tokens are appended to `escaped`."""
    if isinstance(value, str):

        def replace(found: re.Match[str]) -> str:
            escaped.append(found.group())
            return placeholder(len(escaped) - 1)

        return tokens.sub(replace, value)
    if isinstance(value, dict):
        return {escape(key, tokens, escaped): escape(item, tokens, escaped) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape(item, tokens, escaped) for item in value]
    return value


@dataclass(frozen=True, slots=True)
class Unescaped:
    """A text without placeholders. Positions are characters of it."""

    text: str
    cuts: tuple[int, ...]
    plain: tuple[tuple[int, int], ...]
    """Ranges that were escaped."""
    positions: tuple[int, ...]


def unescape(text: str, escaped: Sequence[str], positions: Sequence[int]) -> Unescaped:
    """Remove the placeholders. `positions`, ascending, are carried over; a position within a placeholder would be a bug."""
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

    for found in PLACEHOLDER.finditer(text):
        carry(found.start())
        pieces.append(text[at : found.start()])
        length += found.start() - at
        if found[1] is None:
            cuts.append(length)
        else:
            word = escaped[int(found[1])]
            pieces.append(word)
            plain.append((length, length + len(word)))
            length += len(word)
        at = found.end()
    carry(len(text))
    pieces.append(text[at:])
    return Unescaped("".join(pieces), tuple(cuts), tuple(plain), tuple(moved))
