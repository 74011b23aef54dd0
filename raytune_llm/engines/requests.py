"""What an engine takes and gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raytune_llm.records import Conversation

Finish = Literal["stop", "length", "cancelled"]
"""stop: an end token or a stop string; length: as many tokens as asked for, or as the model has positions for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """The grammar that an answer follows, for xgrammar: the text of a JSON schema, of a regular expression, of an EBNF grammar,
    or of a structural tag (JSON), which constrains the text between certain tags only."""

    kind: Literal["json_schema", "json", "regex", "ebnf", "structural_tag"]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest where temperature is 0, else drawn by `seed`.

    The penalties are vLLM's: `repetition_penalty` divides positive and multiplies negative logits of tokens that the prompt or
    the answer holds (Keskar et al. 2019). From the logit of a token that the answer holds, `presence_penalty` is subtracted once,
    and `frequency_penalty` once for each time that it occurs.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """The answer's end is no candidate before so many tokens, and stop strings in them don't end it."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: every token is a candidate."""
    min_p: float = 0.0
    """Candidates have at least so much of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), ..."""
    among: tuple[int, ...] = ()
    """Only these tokens are candidates; empty: all are."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer and are no part of it."""
    shown_ids: tuple[int, ...] = ()
    """Special tokens that are part of the text, such as those around tool calls."""
    ignore_end: bool = False
    """Answers have max_new_tokens tokens, whatever the model says: for benchmarks."""
    logprobs: int | None = None
    """How many of the likeliest tokens' log-probabilities are returned beside the chosen one's; None: no log-probabilities."""
    grammar: Grammar | None = None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids, or as a conversation that is rendered as in training, up to the start of the next answer."""

    prompt_ids: Sequence[int] = ()
    conversation: Conversation | None = None
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """None: the model as it was given to the engine."""
    goes_on: bool = False
    """The answer's text goes on with the prompt's: a space that it begins with is kept."""

    def __post_init__(self) -> None:
        assert (len(self.prompt_ids) > 0) != (self.conversation is not None), "a request has prompt_ids or a conversation"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability under the model's own logits, in nats: before temperature, penalties and grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, the likeliest first."""


class ScoredToken(NamedTuple):
    """A token of an answer that was given, not made."""

    logprob: float
    """The log-probability under the model's own logits, in nats."""
    likeliest: bool
    """Whether it is what greedy decoding would have chosen here."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens here with their log-probabilities, the likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    ids: tuple[int, ...]
    """New tokens, without the end token."""
    text: str
    """The text without the stop string, and without special tokens other than Sampling.shown_ids."""
    finish: Finish
    prompt_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, where they were asked for."""
    queued_s: float | None = None
    """Seconds that the request waited before its first step. None: unknown, or it never had one."""
    adapter_version: str | None = None
    """The digest of the adapter that made it; None: the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a step adds to an answer. The last one has its `completion`."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None


class Stream:
    """The answer to one request, as it comes: an iterator of Delta for any one thread, fed by the engine's.

    `on_news`, where given, is called by the engine's thread whenever something can be taken (an event loop's wake-up).
    """

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self.cancelled = threading.Event()
        self.on_news: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """Nobody waits for the rest: its row is freed before the engine's next step."""
        self.cancelled.set()

    def put(self, delta: Delta) -> None:
        with self._ready:
            self._deltas.append(delta)
            self._ready.notify_all()
        self.on_news()

    def fail(self, error: Exception) -> None:
        with self._ready:
            self._error = error
            self._ready.notify_all()
        self.on_news()

    def take(self, timeout_s: float | None = None) -> list[Delta]:
        """All that came since the last time; waits for something. Raises what the request failed with."""
        with self._ready:
            self._ready.wait_for(lambda: self._deltas or self._error is not None, timeout_s)
            taken, self._deltas = self._deltas, []
            if not taken and self._error is not None:
                raise self._error
            return taken

    def __iter__(self):
        while True:
            for delta in self.take():
                yield delta
                if delta.completion is not None:
                    return

    def result(self) -> Completion:
        """The whole answer, when it is there."""
        for delta in self:
            if delta.completion is not None:
                return delta.completion
        raise AssertionError("a stream ends with a completion")
