"""What an engine takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raytune_llm.records import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest where temperature is 0, else drawn by `seed`."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: every token is a candidate."""
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids, or as a conversation that is rendered as in training, up to the start of the next answer."""

    prompt_ids: Sequence[int] = ()
    conversation: Conversation | None = None
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """None: the model as it was given to the engine."""

    def __post_init__(self) -> None:
        assert (len(self.prompt_ids) > 0) != (self.conversation is not None), "a request has prompt_ids or a conversation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    ids: tuple[int, ...]
    """New tokens, without the end token."""
    text: str
    """Without special tokens."""
    finish: Literal["stop", "length"]
    prompt_tokens: int
