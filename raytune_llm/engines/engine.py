"""The protocol of engines: requests in, tokens out, adapters loaded and unloaded while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raytune_llm.engines.requests import Completion, Request, ScoredToken, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One name that requests may use."""

    name: str
    version: str
    """The digest of its weights and config."""
    rank: int
    residency: str
    """device: its weights are there; host: they are copied to the device between two steps; disk: they are read first."""
    pinned: bool
    in_use: int
    """Running requests with this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The current state of an engine."""

    running: int
    waiting: int
    waiting_by_reason: Mapping[str, int]
    """adapter: for a slot; weights: for the adapter's weights to be read; cache: for free blocks; rows: for one of the batch's
    rows, or for its turn."""
    cache_used: float
    """The fraction of the KV cache's blocks in use."""
    prefix_hits: int
    prefix_queries: int
    """Tokens of prompts that the prefix cache held, and tokens of prompts."""
    generated_tokens: int
    prompt_tokens: int
    preemptions: int
    adapter_loads: int
    adapter_evictions: int
    steps: int
    last_step_at: float
    """time.monotonic() of the loop's last heartbeat."""
    adapter_slots: int = 0
    """Adapters that can be on the device at once. 0: unknown, or the engine takes none."""
    waiting_adapters: tuple[str, ...] = ()
    """Adapters of waiting requests, where adapter_slots is known."""
    failure: str | None = None
    """Why the engine answers no more. None: it runs."""


class Engine(Protocol):
    """A thread of its own owns the policy. All methods may be called from any thread."""

    @property
    def max_rows(self) -> int:
        """Answers that are generated at once."""
        ...

    @property
    def max_length(self) -> int:
        """Maximum tokens of a prompt and its answer."""
        ...

    def submit(self, request: Request) -> Stream:
        """Raises ConfigError for an adapter that is not there or a prompt that is too long."""
        ...

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        """A vector for each prompt: the `mean` of the last hidden states, the `last` token's, or a reward model's `score`.
        Computed in passes of about a step's tokens, between the steps of others. The future may be cancelled."""
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
        """For each answer its tokens, scored after its prompt, which has at least one token. Computed as by `pooled`.

        share_prefixes: with a prefix cache, over the cache: what prompts begin with alike is computed once, and the last digits
        depend on what was computed before. top: how many of the likeliest tokens are returned beside each; not with
        share_prefixes.
        """
        ...

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        """Read and check an adapter, so that requests can name it. Returns its version. If the name exists already, it gets a new
        version; running requests finish on the old one. pinned: see `pin`. Raises ConfigError or DataError for an adapter that
        doesn't fit, and changes nothing then."""
        ...

    def remove_adapter(self, name: str) -> None:
        """Running requests finish with it. Raises ConfigError if no adapter has the name; so does `pin`."""
        ...

    def has_adapter(self, name: str) -> bool:
        """Whether requests can name it. Quick, since it is called for each request."""
        ...

    def adapters(self) -> Sequence[AdapterState]:
        """Those that requests can name."""
        ...

    def pin(self, name: str, pinned: bool) -> None:
        """Whether the adapter stays on the device when others need its place. Raises ConfigError where no place would be left
        for others. The name keeps its pin when it gets a new version."""
        ...

    def stats(self) -> Stats: ...

    def close(self) -> None:
        """End the thread. Requests that are not finished fail."""
        ...


def generate(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """One completion a request, in the order of the requests."""
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]
