"""A rendered conversation, and the interface of what renders one: a tokenizer's own chat template or a named one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jinja2 import TemplateError

from raytune_llm.data.templates.control_tokens import ControlTokens, control_tokens
from raytune_llm.records import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_CACHED_SHAPES = 1000
"""Conversation shapes that a renderer caches; then the cache is cleared."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row and the places of its answers."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters [start, end) of each answer, its end token included. Untrained ones before the last may be missing."""
    weights: tuple[float, ...]
    """The loss weight of each answer; 0: it is not trained."""
    cuts: tuple[int, ...] = ()
    """Characters at which the text is cut into pieces that are tokenized separately."""
    plain: tuple[tuple[int, int], ...] = ()
    """Characters [start, end) of user text that equals a control token's text and is not tokenized as one."""
    ends_early: bool = False
    """The last answer was cut, and ends before the end token that the template writes."""

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Characters [start, end) of the trained answers."""
        return tuple(answer for answer, weight in zip(self.answers, self.weights, strict=True) if weight)


class Renderer(Protocol):
    """Renders conversations, with a tokenizer's own chat template or a named one."""

    end_of_row: str | None
    """A token to train after each answer that the template doesn't write itself. None: the template writes one."""
    control: ControlTokens
    """The tokenizer's control tokens, which are escaped in the contents of messages."""

    def render(self, conversation: Conversation, *, earlier_answers: bool = True) -> Rendered:
        """Raises BadRow if the template rejects the conversation, RefusedRow if its answers can't be found in the text.

        earlier_answers: render answers before the last as trained ones, with their reasoning; else as in the prompt of later
        turns.
        """
        ...

    def pair(self, chosen: Conversation, rejected: Conversation) -> tuple[Rendered, Rendered]:
        """Two conversations that differ in their last answer only. Their texts are equal up to it."""
        ...


class PlainText:
    """In place of a Renderer for plain text, which has no turns."""

    end_of_row: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.control = control_tokens(special_tokens(tokenizer))


def loss_weight(message: Message) -> float:
    return message.weight if message.trained else 0.0


def in_pairs(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(positions[::2], positions[1::2], strict=True))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def end_tokens(tokenizer: PreTrainedTokenizerFast) -> set[str]:
    """The texts of tokens that an answer must not contain."""
    return {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token is not None}


@contextmanager
def template_errors() -> Iterator[None]:
    """Turns a template's TypeError or ValueError into a TemplateError. Tool declarations may have values of any type."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise TemplateError(str(error)) from error
