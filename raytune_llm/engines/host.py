"""The interface that another package's engine (vLLM, SGLang) implements to be served by HostedEngine."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from raytune_llm.engines.requests import Finish, Sampling, TokenLogprob


@dataclass(eq=False)
class AdapterVersion:
    """One version of an adapter, with a copy of its files: they stay the same if the folder is replaced."""

    name: str
    number: int
    """A number from 1 on, unique among all versions of all adapters."""
    digest: str
    rank: int
    files: tempfile.TemporaryDirectory[str]
    pinned: bool
    users: int = 0
    """Number of its requests that are running or waiting."""
    retired: bool = False
    """Whether it was replaced or removed. New requests don't use it, and it is unloaded after its last request."""

    @property
    def key(self) -> str:
        """Its name in the package. Each version has its own, because packages use the name as a key of their prefix caches."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRequest:
    """A request in the form that hosts take."""

    key: str
    """Unique in the engine."""
    prompt_ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    end_ids: tuple[int, ...]
    """Stop tokens; empty with sampling.ignore_end."""
    version: AdapterVersion | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedTokens:
    """The tokens that were generated since the previous ones."""

    ids: Sequence[int]
    """Including the stop token."""
    logprobs: Sequence[TokenLogprob] = ()
    """One per token, if the request asks for them."""
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    finish: Finish | None = None


class Host(Protocol):
    """A running engine of the package. Its methods are called in the event loop in which it was created."""

    def generate(self, request: HostRequest) -> AsyncGenerator[GeneratedTokens, None]:
        """The answer's tokens as they come; the last ones have a `finish`. Raises UserError for what the package refuses. Closing
        the generator aborts the request."""
        ...

    async def load(self, version: AdapterVersion) -> None:
        """Load the adapter, and pin it if it is pinned. Raises ConfigError if the package refuses it."""
        ...

    async def unload(self, version: AdapterVersion) -> None:
        """Unload the adapter, which no request uses any more."""
        ...

    def failure(self) -> str | None:
        """Why the package has failed for good. None: it is running."""
        ...

    def close(self) -> None: ...
