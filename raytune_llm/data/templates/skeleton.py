"""Skeletons: the rendered text of a conversation without the contents of its messages.

Most templates write the same text around each message, whatever its content is. So one conversation of placeholders is rendered,
and others of the same shape are its skeleton with their own contents filled in. The renderers check whether a template works like
this (chat_template.py, named_chat.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_llm.data.templates.control_tokens import PLACEHOLDER, placeholder
from raytune_llm.records import Conversation

Position = tuple[int, int]
"""(index of a piece of the skeleton, characters into the piece)."""
Shape = tuple[tuple[str, bool], ...]


def shape_of(conversation: Conversation) -> Shape:
    """(role, whether it has a content) of each message."""
    return tuple([(message.role, message.content != "") for message in conversation.messages])


def placeholders(shape: Shape) -> list[str]:
    """Contents of the conversation for Skeleton.of. Each has a different length, for templates that depend on lengths."""
    return [placeholder(number, number + 1) if has_content else "" for number, (_, has_content) in enumerate(shape)]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """Fills contents into a text, and knows the places of answers and cuts in it."""

    pieces: tuple[str, ...]
    """The text before, between and after the contents."""
    slots: tuple[int, ...]
    """The index of the message whose content is between a piece and the next."""
    positions: tuple[Position, ...]
    """Where answers start and end."""
    cuts: tuple[Position, ...]

    @classmethod
    def of(cls, text: str, positions: Sequence[int]) -> Skeleton:
        """The Skeleton of a rendered conversation of placeholders. positions: characters of it to locate, ascending."""
        pieces = [""]
        slots: list[int] = []
        cuts: list[Position] = []
        kept: list[Position] = []
        at = 0

        def go_to(end: int) -> None:
            while len(kept) < len(positions) and positions[len(kept)] <= end:
                kept.append((len(slots), len(pieces[-1]) + positions[len(kept)] - at))
            pieces[-1] += text[at:end]

        for found in PLACEHOLDER.finditer(text):
            go_to(found.start())
            at = found.end()
            if found[1] is None:
                cuts.append((len(slots), len(pieces[-1])))
            else:
                slots.append(int(found[1]))
                pieces.append("")
        go_to(len(text))
        return cls(tuple(pieces), tuple(slots), tuple(kept), tuple(cuts))

    def fill(self, contents: Sequence[str]) -> tuple[str, list[int], list[int]]:
        """(text, characters of the positions, characters of the cuts) with these contents."""
        parts = [self.pieces[0]]
        starts = [0]
        length = len(parts[0])
        for slot, piece in zip(self.slots, self.pieces[1:], strict=True):
            content = contents[slot]
            parts += (content, piece)
            length += len(content)
            starts.append(length)
            length += len(piece)
        positions = [starts[piece] + offset for piece, offset in self.positions]
        return "".join(parts), positions, [starts[piece] + offset for piece, offset in self.cuts]
