"""A row of the engine's batch: one answer that is being generated."""

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
    """The tokens of the prompt and of the answer so far. -1 - i is a token that the host has not read, at place i on the
    device."""
    prompt_tokens: int
    limit: int
    """The maximum number of tokens of prompt and answer."""
    adapter: Adapter | None = None
    """None: the base alone."""
    matcher: Any = None
    """xgrammar's matcher, if the row has a grammar."""
    slot: int = -1
    """The adapter's slot, while the row runs."""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """The number of tokens whose keys and values are in the blocks."""
    cached_tokens: int = 0
    """The number of prompt tokens that were found in the prefix cache."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    queued_s: float | None = None
    """Seconds from its arrival to its first step. None: it still waits."""
    done: bool = False
    """Whether its stream has ended. Tokens that are still computed for it are dropped."""
    ended: bool = False
    """Whether it has left the batch."""
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
        """Whether it has its maximum number of tokens, including those that the host has not read."""
        return len(self.ids) >= self.limit

    @property
    def needs_tokens(self) -> bool:
        """Whether its last token must be read before the next one can be sampled."""
        return self.matcher is not None or self.sampler.penalized or self.sampling.logprobs is not None

    @property
    def pending(self) -> int:
        """The number of tokens still to compute: one while decoding, more for a prompt."""
        return len(self.ids) - self.computed

    def digests(self, blocks: int, block_size: int) -> list[bytes]:
        """The digests of the first `blocks` blocks, which must be full."""
        while len(self._digests) < blocks:
            parent = self._digests[-1] if self._digests else root(self.adapter.version if self.adapter else "")
            at = len(self._digests) * block_size
            self._digests.append(digest(self.ids[at : at + block_size], parent))
        return self._digests[:blocks]
