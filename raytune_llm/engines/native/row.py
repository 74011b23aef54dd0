"""One answer in the making: a row of the engine's batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from raytune_llm.engines.native.blocks import digest, root
from raytune_llm.engines.native.sampler import RowSampler
from raytune_llm.engines.native.slots import Adapter
from raytune_llm.engines.native.text import TextStream
from raytune_llm.engines.requests import Sampling, Stream, TokenLogprob


@dataclass(eq=False)
class Row:
    stream: Stream
    sampling: Sampling
    sampler: RowSampler
    text: TextStream
    ids: list[int]
    """Prompt and answer so far. A negative one is a token that the host has not read: -1 minus its place on the device."""
    prompt_tokens: int
    limit: int
    """Tokens of prompt and answer, at most."""
    adapter: Adapter | None = None
    """None: the base alone."""
    matcher: Any = None
    """xgrammar's, of a row with a grammar."""
    slot: int = -1
    """The adapter's slot, while the row runs."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the blocks."""
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    queued_s: float | None = None
    """Seconds from its arrival to its first step. None: it still waits."""
    done: bool = False
    """Its stream has its end: what is computed of it still is nobody's."""
    ended: bool = False
    """It left the batch."""
    blocked_on: str | None = None
    """Why it waits."""
    _digests: list[bytes] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_tokens :]

    @property
    def known(self) -> int:
        """Tokens that the host has read."""
        unread = sum(1 for token in self.ids[-2:] if token < 0)
        return len(self.ids) - unread

    @property
    def complete(self) -> bool:
        """It has all tokens that it may have, read or not."""
        return len(self.ids) >= self.limit

    @property
    def needs_tokens(self) -> bool:
        """Its next token can't be drawn before its last one is read."""
        return self.matcher is not None or self.sampler.penalized or self.sampling.logprobs is not None

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed: one while it decodes, more of a prompt."""
        return len(self.ids) - self.computed

    def digests(self, blocks: int, block_size: int) -> list[bytes]:
        """Digests of the first blocks, which are full."""
        while len(self._digests) < blocks:
            parent = self._digests[-1] if self._digests else root(self.adapter.version if self.adapter else "")
            at = len(self._digests) * block_size
            self._digests.append(digest(self.ids[at : at + block_size], parent))
        return self._digests[:blocks]
