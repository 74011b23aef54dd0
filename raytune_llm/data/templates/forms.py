"""What the texts of all conversations of one shape share: the conversation rendered without what its messages say.

Most templates write the same words around each message, whatever it says. So a conversation of placeholders is rendered once,
and any other of its shape is that form with its own contents filled in. The renderer knows whether a template works like this,
or finds out by comparing (data/templates/render.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytune_llm.data.templates.control_tokens import PLACEHOLDER, placeholder
from raytune_llm.records import Conversation

Position = tuple[int, int]
"""A piece of the form, and characters into it."""
Shape = tuple[tuple[str, bool], ...]


def shape_of(conversation: Conversation) -> Shape:
    """The roles in order, and whether they say anything at all."""
    return tuple([(message.role, message.content != "") for message in conversation.messages])


def placeholders(shape: Shape) -> list[str]:
    """Contents for a conversation that Form.of is made from. Each has its own length, for templates that read it."""
    return [placeholder(number, number + 1) if says_something else "" for number, (_, says_something) in enumerate(shape)]


@dataclass(frozen=True, slots=True)
class Form:
    pieces: tuple[str, ...]
    """The text before, between and after the contents."""
    slots: tuple[int, ...]
    """The message whose content stands between a piece and the next."""
    positions: tuple[Position, ...]
    cuts: tuple[Position, ...]

    @classmethod
    def of(cls, text: str, positions: Sequence[int]) -> Form:
        """The form of a rendered conversation of placeholders, and what lies at these characters of it (ascending)."""
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
        """The text with these contents, and the characters at which positions and cuts are."""
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
