"""The pieces of an answer that may hold reasoning and tool calls, and what the parsers of whole answers share."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

Names = frozenset[str] | None
"""The tools of a request. None: any tool may be called."""
PartKind = Literal["content", "reasoning", "call", "arguments"]


@dataclass(frozen=True, slots=True)
class OutputPart:
    """A piece of an answer: text of content, of reasoning, or of the arguments of the last call; or a call's name."""

    kind: PartKind
    text: str = ""
    id: str = ""
    """Of a call, as the API reports it."""

    @classmethod
    def call(cls, name: str) -> OutputPart:
        return cls("call", name, f"call_{secrets.token_hex(12)}")


@dataclass(slots=True)
class AnswerParser(ABC):
    """Parses one answer: `push` for each new piece of text, then `finish`."""

    syntax: Any
    names: Names = None
    """A call of any other tool stays content."""
    _held: str = ""
    """Text that has not been returned yet."""

    def push(self, text: str) -> list[OutputPart]:
        return self._read(text, final=False)

    def finish(self) -> list[OutputPart]:
        """The text that was still held back, and calls that the end of the answer completes."""
        return self._read("", final=True)

    def _read(self, text: str, *, final: bool) -> list[OutputPart]:
        parts: list[OutputPart] = []
        self._held += text
        while self._step(parts, final):
            pass
        return parts

    @abstractmethod
    def _step(self, parts: list[OutputPart], final: bool) -> bool:
        """Return what can be returned now. False: nothing is left, or more text is needed."""


def pending_length(text: str, tag: str) -> int:
    """Number of characters at the end of `text` that could be the start of `tag`, with the white space before it."""
    size = next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
    return len(text) - len(text[: len(text) - size].rstrip())
