"""The requests to an engine and its results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from raytune_llm.errors import DataError
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
    """How the next token is chosen: the likeliest one if temperature is 0, else a random one with `seed`.

    The penalties are vLLM's. `repetition_penalty` divides positive and multiplies negative logits of tokens that occur in the
    prompt or the answer (Keskar et al. 2019). `presence_penalty` is subtracted once from the logit of each token that occurs in
    the answer, and `frequency_penalty` once for each occurrence.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """The answer can't end before it has this many tokens, and stop strings within them are ignored."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: every token is a candidate."""
    min_p: float = 0.0
    """Candidates have at least this fraction of the likeliest token's probability."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), ..."""
    among: tuple[int, ...] = ()
    """Only these tokens are candidates; empty: all are."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    shown_ids: tuple[int, ...] = ()
    """Special tokens that are part of the text, such as those around tool calls."""
    ignore_end: bool = False
    """Ignore end tokens, so that answers have exactly max_new_tokens tokens; for benchmarks."""
    logprobs: int | None = None
    """The number of likeliest tokens to return with log-probabilities, besides the chosen one; None: no log-probabilities."""
    grammar: Grammar | None = None


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, either as token ids, or as a conversation that is rendered as in training up to the start of the next answer."""

    prompt_ids: Sequence[int] = ()
    conversation: Conversation | None = None
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """None: no adapter."""
    goes_on: bool = False
    """Whether the answer continues the prompt's text, so that a leading space is kept."""

    def __post_init__(self) -> None:
        assert (len(self.prompt_ids) > 0) != (self.conversation is not None), "a request has prompt_ids or a conversation"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log-probability in nats, under the model's logits before temperature, penalties and grammar."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, the likeliest first."""


class ScoredToken(NamedTuple):
    """A token of a given answer."""

    logprob: float
    """The log-probability under the model's own logits, in nats."""
    likeliest: bool
    """Whether greedy decoding would choose it here."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens here with their log-probabilities, the likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    ids: tuple[int, ...]
    """The generated tokens, without the end token."""
    text: str
    """The text without the stop string, and without special tokens other than Sampling.shown_ids."""
    finish: Finish
    prompt_tokens: int
    cached_tokens: int = 0
    """The number of prompt tokens that were found in the prefix cache."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token, if requested."""
    queued_s: float | None = None
    """Seconds that the request waited before its first step. None: unknown, or it never had one."""
    adapter_version: str | None = None
    """The digest of the adapter that generated it; None: no adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The part of an answer that one step adds. The last one has the `completion`."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None


class NotFinite(DataError):
    """A model's results are no numbers, as with weights that are damaged or too large."""

    def __init__(self, model: str | None = None) -> None:
        """model: the adapter's name. None: the base."""
        self.model = model
        super().__init__(model or "the model", "its results for this prompt are no finite numbers", "Are its weights damaged?")

    def __reduce__(self):
        return NotFinite, (self.model,)


class Stream:
    """The answer to one request as an iterator of Delta, for one thread; the engine's thread fills it.

    `on_news`, if set, is called by the engine's thread whenever `take` would return something, to wake an event loop.
    """

    def __init__(self) -> None:
        self._ready = threading.Condition()
        self._deltas: list[Delta] = []
        self._error: Exception | None = None
        self.cancelled = threading.Event()
        self.on_news: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """Cancel the request; its row is freed before the engine's next step."""
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
        """All deltas since the last call; waits for at least one. Raises the error with which the request failed."""
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
        """The complete answer. Blocks until it is there."""
        for delta in self:
            if delta.completion is not None:
                return delta.completion
        raise AssertionError("a stream ends with a completion")
