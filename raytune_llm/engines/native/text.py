"""Incremental detokenizing of an answer, in whole characters and without stop strings.

A token may end within a character (byte-level vocabularies), and a stop string may span several tokens. So text is held back
while its last character is incomplete, or while it may become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_llm.engines.requests import Request

REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are not a complete character."""
MAX_HELD_TOKENS = 8
"""After this many tokens, bytes that are not a character are given out as they are."""


class TextStream:
    """The text of one answer. `push` takes a token and returns the text that is final by then."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        shown_ids: Sequence[int] = (),
        *,
        min_tokens: int = 0,
        after: Sequence[int] = (),
    ) -> None:
        """shown_ids: special tokens that are part of the text. min_tokens: stop strings are ignored in this many first tokens.
        after: the tokens of a text that the answer continues. Without them, the first token would lose its leading space.
        """
        self._tokenizer = tokenizer
        self._hidden = _special_ids(tokenizer).difference(shown_ids) if shown_ids else None
        """Tokens that are not part of the text. None: all special tokens."""
        self._stop = tuple(filter(None, stop))
        self._ids: list[int] = list(after[-MAX_HELD_TOKENS:])
        self._unstopped = len(self._ids) + min_tokens
        self._start, self._decoded = 0, len(self._ids)
        """Tokens from `_start` on are decoded together, because a token's text can depend on the ones before. The text of those
        up to `_decoded` was given out."""
        self._held = ""
        self.text = ""
        """What was given out."""
        self.stopped: str | None = None
        """The stop string that ended the answer, which is not part of the text."""

    def push(self, token: int) -> str:
        """The text that is final with this token; empty after a stop string."""
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        return self._give(self._held + self._new_text(final=False), final=False)

    def finish(self) -> str:
        """The text that was held back, at the end of the answer."""
        if self.stopped is not None:
            return ""
        return self._give(self._held + self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._decoded])
        now = self._decode(self._ids[self._start :])
        waits = now.endswith(REPLACEMENT) and len(self._ids) - self._decoded < MAX_HELD_TOKENS
        if not final and (waits or len(now) <= len(before)):
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        if self._hidden is not None:
            ids = [id for id in ids if id not in self._hidden]
        return self._tokenizer.decode(ids, skip_special_tokens=self._hidden is None) if ids else ""

    def _give(self, text: str, *, final: bool) -> str:
        stops = self._stop if len(self._ids) > self._unstopped else ()
        ends = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            at, self.stopped = min(ends, key=lambda end: (end[0], -len(end[1])))
            self._held, given = "", text[:at]
        else:
            keep = 0 if final else max((_overlap(text, stop) for stop in stops), default=0)
            self._held, given = text[len(text) - keep :], text[: len(text) - keep]
        self.text += given
        return given


def text_of(tokenizer: Any, request: Request, prompt_ids: Sequence[int]) -> TextStream:
    """The text of an engine's answer to the request, as it grows."""
    sampling, after = request.sampling, prompt_ids if request.goes_on else ()
    return TextStream(tokenizer, sampling.stop, sampling.shown_ids, min_tokens=sampling.min_new_tokens, after=after)


def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the text's end that are a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
