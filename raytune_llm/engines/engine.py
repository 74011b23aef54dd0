"""The interface of engines: requests in, tokens out. Adapters can be loaded and unloaded while an engine runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raytune_llm.engines.requests import Completion, Request, ScoredToken, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """An adapter that requests may name."""

    name: str
    version: str
    """The digest of its weights and config."""
    rank: int
    residency: str
    """Where its weights are: `device`; `host`, from which they are copied to the device between two steps; or `disk`."""
    pinned: bool
    in_use: int
    """Running requests with this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The current state of an engine."""

    running: int
    waiting: int
    waiting_by_reason: Mapping[str, int]
    """The number of waiting requests by what they wait for. adapter: a slot; weights: the adapter's weights, which are being
    read; cache: free blocks; rows: a place in the batch, or their turn."""
    cache_used: float
    """The fraction of the KV cache's blocks in use."""
    prefix_hits: int
    prefix_queries: int
    """The number of prompt tokens found in the prefix cache, and of all prompt tokens."""
    generated_tokens: int
    prompt_tokens: int
    preemptions: int
    adapter_loads: int
    adapter_evictions: int
    steps: int
    last_step_at: float
    """time.monotonic() of the loop's last heartbeat."""
    adapter_slots: int = 0
    """The number of adapters that fit the device at once; 0: unknown, or adapters are not supported."""
    waiting_adapters: tuple[str, ...] = ()
    """The adapters of waiting requests; empty if adapter_slots is 0."""
    failure: str | None = None
    """Why the engine has stopped for good; None: it runs."""


class Engine(Protocol):
    """Generates answers in its own thread, which owns the policy. All methods may be called from any thread."""

    @property
    def max_rows(self) -> int:
        """The number of answers that are generated concurrently."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum tokens of a prompt and its answer."""
        ...

    def submit(self, request: Request) -> Stream:
        """Raises ConfigError for an adapter that is not there or a prompt that is too long."""
        ...

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        """A vector for each prompt: the `mean` of the last layer's hidden states, the `last` token's state, or a reward model's
        `score`. Computed in passes of about a step's tokens, between the steps of other requests. The future may be cancelled."""
        ...

    def answer_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        adapter: str | None = None,
        *,
        share_prefixes: bool = False,
        top: int = 0,
    ) -> Future[list[list[ScoredToken]]]:
        """The tokens of each answer with their log-probabilities after the prompt, which has at least one token.

        Scheduled like `pooled`. share_prefixes: use the prefix cache, if there is one, to compute common beginnings of prompts
        once. The last digits then depend on what was computed before. top: the number of likeliest tokens to return for each
        token; can't be combined with share_prefixes.
        """
        ...

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        """Read and check an adapter, so that requests can name it. Returns its version.

        If the name exists, it gets a new version, and running requests finish with the old one. pinned: see `pin`. Raises
        ConfigError or DataError for an adapter that doesn't fit; nothing changes then."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Remove the adapter; running requests finish with it. Raises ConfigError if no adapter has the name."""
        ...

    def has_adapter(self, name: str) -> bool:
        """Whether requests can name it. Fast, since it is called for each request."""
        ...

    def adapters(self) -> Sequence[AdapterState]:
        """The adapters that requests can name."""
        ...

    def pin(self, name: str, pinned: bool) -> None:
        """Set whether the adapter stays on the device when others need its slot; new versions of the name stay pinned. Raises
        ConfigError if no adapter has the name, or if no slot would be left for others."""
        ...

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """End the thread. Requests that are not finished fail."""
        ...


def generate(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """One completion per request, in their order. Blocks until all are complete."""
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]
