"""The engine: a thread that owns the policy and answers many requests at once, each with its own adapter and its own sampling.

A step reads `schedule, run, sample, publish`. What comes from other threads (requests, cancellations, adapters) is taken up
between two steps. Shapes and names follow nano-vllm, whose loop this is; what it computes is the policy's own path through its
layers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from raytune_llm.engines.engine import AdapterState, Stats
from raytune_llm.engines.native.adapter_store import AdapterStore
from raytune_llm.engines.native.blocks import BlockPool
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.sampler import RowSampler, logprobs, sample
from raytune_llm.engines.native.scheduler import Piece, Scheduler
from raytune_llm.engines.native.slots import Adapter, Bank, Slots
from raytune_llm.engines.native.text import TextStream
from raytune_llm.engines.requests import Completion, Delta, Finish, Grammar, Request, ScoredToken, Stream, TokenLogprob
from raytune_llm.errors import ConfigError, ResourceError

T = TypeVar("T")
IDLE_S = 0.2
"""Seconds between heartbeats of an idle loop."""


class Runner(Protocol):
    """Computes pieces of rows with the policy, over the paged cache."""

    num_blocks: int
    block_size: int
    bank: Bank | None
    vocab_size: int
    device: torch.device

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """float32 [R, V]: logits at the last token of each piece that samples, in their order."""
        ...

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, slot: int) -> list[list[float]]:
        """A vector a prompt, each computed under the adapter in the slot; -1: the base."""
        ...

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int
    ) -> list[list[ScoredToken]]:
        """Each answer's tokens as the model, asked with its prompt, would have written them."""
        ...

    def read_adapter(self, folder: Path) -> tuple[Any, int]:
        """Weights as the bank takes them, and their rank. Raises a UserError for an adapter that doesn't fit base and bank."""
        ...


class NativeEngine:
    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        end_ids: Sequence[int],
        max_length: int,
        max_rows: int = 64,
        step_tokens: int = 512,
        max_host_adapters: int = 256,
        prefix_cache: bool = True,
        render: Callable[[Any], Sequence[int]] | None = None,
        threaded: bool = True,
        overlaps: bool | None = None,
    ) -> None:
        """max_length: tokens of a prompt and its answer, at most. step_tokens: of a step. render: a Conversation's prompt ids.
        threaded: false where `generate` is all that will be called, and is to take the steps itself. overlaps: a step's text is
        made while the device computes the next one; None: on a GPU, where starting a step doesn't wait for it."""
        self._overlaps = runner.device.type == "cuda" if overlaps is None else overlaps
        self._runner, self._tokenizer, self._render = runner, tokenizer, render
        self._end_ids = tuple(end_ids)
        self._max_length = min(max_length, runner.num_blocks * runner.block_size)
        self._blocks = BlockPool(runner.num_blocks, runner.block_size, prefix_cache=prefix_cache)
        self._slots = None if runner.bank is None else Slots(runner.bank)
        self._scheduler = Scheduler(self._blocks, self._slots, max_rows=max_rows, step_tokens=max(step_tokens, max_rows))
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """For the loop, from other threads."""
        self._later: list[Callable[[], None]] = []
        """For its next round."""
        self._untold: list[tuple[Row, int, TokenLogprob | None, Finish | None]] = []
        """Tokens of the last step that nobody was told of yet."""
        self._store = AdapterStore(runner.read_adapter, max_host=max_host_adapters, on_read=lambda: self._calls.put(lambda: None))
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._steps = self._generated = self._prompted = 0
        self._last_step_at = time.monotonic()
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True) if threaded else None
        if self._thread is not None:
            self._thread.start()

    # From any thread -----------------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        return self._max_length

    def submit(self, request: Request) -> Stream:
        self._check_alive()
        adapter = None
        if request.adapter is not None and (adapter := self._store.get(request.adapter)) is None:
            raise ConfigError("the model", "must be the base or an adapter that is loaded", got=request.adapter)
        sampling = request.sampling
        ids = [int(id) for id in self._prompt_ids(request)]
        if len(ids) + 1 > self._max_length:
            raise ConfigError("the prompt", f"must leave room for an answer within {self._max_length} tokens", got=len(ids))
        matcher = None if sampling.grammar is None else self._matcher(sampling.grammar)
        stream = Stream()
        row = Row(
            stream=stream,
            sampling=sampling,
            sampler=RowSampler(sampling, self._end_ids, ids),
            text=TextStream(self._tokenizer, sampling.stop),
            ids=list(ids),
            prompt_tokens=len(ids),
            limit=min(len(ids) + sampling.max_new_tokens, self._max_length),
            adapter=adapter,
            matcher=matcher,
        )
        self._calls.put(partial(self._scheduler.add, row))
        if self._closed.is_set():  # meanwhile: it may have been put after the loop took up what was left
            stream.fail(self._gone())
        return stream

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        streams = [self.submit(request) for request in requests]
        if self._thread is None:
            self._answer_all()
        return [stream.result() for stream in streams]

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        return self._between_steps(partial(self._runner.pooled, prompts, pooling), adapter)

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], adapter: str | None = None
    ) -> Future[list[list[ScoredToken]]]:
        longest = max((len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)), default=0)
        if longest > self._max_length:
            raise ConfigError("a prompt and its answer", f"must have at most {self._max_length} tokens", got=longest)
        return self._between_steps(partial(self._runner.answer_logprobs, prompts, answers), adapter)

    def _between_steps(self, compute: Callable[[int], T], adapter: str | None) -> Future[T]:
        """What `compute` gives for the slot that the adapter has then; -1: the base."""
        self._check_alive()
        version = None
        if adapter is not None and (version := self._store.get(adapter)) is None:
            raise ConfigError("the model", "must be the base or an adapter that is loaded", got=adapter)
        future: Future[T] = Future()
        self._calls.put(partial(self._compute, compute, version, future))
        return future

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        self._check_alive()
        if self._slots is None:
            raise ConfigError("the adapter", "can't be served over this model", got=name)
        adapter, before = self._store.add(name, Path(folder), pinned=pinned)
        if before is not None:
            self._calls.put(partial(self._slots.forget, before))
        return adapter.version

    def remove_adapter(self, name: str) -> None:
        adapter = self._store.remove(name)
        if adapter is None:
            raise ConfigError("the adapter", "must be one that is loaded", got=name)
        assert self._slots is not None
        self._calls.put(partial(self._slots.forget, adapter))

    def has_adapter(self, name: str) -> bool:
        return self._store.get(name) is not None

    def adapters(self) -> list[AdapterState]:
        return [
            AdapterState(
                name=one.name,
                version=one.version,
                rank=one.rank,
                residency="device" if one.slot is not None else "disk" if one.weights is None else "host",
                pinned=one.pinned,
                in_use=one.users,
            )
            for one in self._store.all()
        ]

    def pin(self, name: str, pinned: bool) -> None:
        adapter = self._store.get(name)
        if adapter is None:
            raise ConfigError("the adapter", "must be one that is loaded", got=name)
        adapter.pinned = pinned

    def stats(self) -> Stats:
        scheduler, slots = self._scheduler, self._slots
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._calls.qsize(),
            waiting_by_reason=scheduler.waiting_by_reason(),
            cache_used=1 - self._blocks.num_free / self._blocks.num_blocks,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            generated_tokens=self._generated,
            prompt_tokens=self._prompted,
            preemptions=scheduler.preemptions,
            adapter_loads=0 if slots is None else slots.loads,
            adapter_evictions=0 if slots is None else slots.evictions,
            steps=self._steps,
            last_step_at=self._last_step_at,
        )

    def close(self) -> None:
        self._closed.set()
        self._calls.put(lambda: None)
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    # The loop's own ------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            with torch.no_grad():
                worked = False
                while not self._closed.is_set():
                    self._take_calls(wait=not worked)
                    self._last_step_at = time.monotonic()
                    worked = self._step()
            self._fail(ResourceError("the engine was closed before the answer was complete"))
        except Exception as error:  # nobody waits for a thread: whoever waits for an answer is told
            self._failure = error
            self._fail(self._gone())
            raise

    @torch.no_grad()
    def _answer_all(self) -> None:
        """In the caller's thread, until nobody waits."""
        self._take_calls(wait=False)
        while self._scheduler.running or self._scheduler.waiting or self._untold:
            worked = self._step()
            assert worked, "a row that fits the cache can be computed"

    def _step(self) -> bool:
        """False where there was nothing to compute."""
        pieces = self._scheduler.schedule()
        if not pieces:
            return self._tell()
        logits_RV = self._runner.run(pieces)
        self._tell()  # of the step before, while the device computes this one
        rows = [piece.row for piece in pieces if piece.samples]
        tokens, told = self._sample(logits_RV, rows) if rows else ([], {})
        for piece in pieces:
            if not piece.row.done:
                self._prompted += max(0, min(piece.stop, piece.row.prompt_tokens) - piece.start)
                self._scheduler.computed(piece)
        for row, token in zip(rows, tokens, strict=True):
            if not row.done:
                self._untold.append((row, token, told.get(row), self._take(row, token)))
        if not self._overlaps:
            self._tell()
        self._steps += 1
        return True

    def _sample(self, logits_RV: Tensor, rows: Sequence[Row]) -> tuple[list[int], dict[Row, TokenLogprob]]:
        """The rows' next tokens, and the log-probabilities of those who ask for them."""
        asking = [number for number, row in enumerate(rows) if row.sampling.logprobs is not None]
        own_RV = logits_RV[asking] if asking else None  # a copy: sampling changes the logits
        bitmask_RW = None if self._grammars is None else self._grammars.bitmask([row.matcher for row in rows])
        if bitmask_RW is not None:
            bitmask_RW = bitmask_RW.to(logits_RV.device, non_blocking=True)
        tokens_R = sample(logits_RV, [row.sampler for row in rows], bitmask_RW)
        told: dict[Row, TokenLogprob] = {}
        if own_RV is not None:
            most = max(rows[number].sampling.logprobs or 0 for number in asking)
            for number, one in zip(asking, logprobs(own_RV, tokens_R[asking], most), strict=True):
                told[rows[number]] = replace(one, top=one.top[: rows[number].sampling.logprobs])
        return tokens_R.tolist(), told

    def _take_calls(self, *, wait: bool) -> None:
        """What other threads asked for."""
        for call in self._later:
            self._calls.put(call)
        self._later = []
        try:
            call = self._calls.get(timeout=IDLE_S) if wait else self._calls.get_nowait()
            while True:
                call()
                call = self._calls.get_nowait()
        except queue.Empty:
            pass
        for row in (*self._scheduler.running, *self._scheduler.waiting):
            if row.stream.cancelled.is_set():
                self._end(row, "cancelled")
            elif row.adapter is not None and not self._store.ready(row.adapter) and row.adapter.failure is not None:
                row.done = True
                self._scheduler.end(row)
                row.stream.fail(row.adapter.failure)

    def _compute(self, compute: Callable[[int], T], adapter: Adapter | None, future: Future[T]) -> None:
        """Its adapter takes a slot like a row's; where none is free, it waits for one."""
        if self._closed.is_set():
            future.set_exception(self._gone())
            return
        slot = -1
        if adapter is not None:
            assert self._slots is not None
            taken = self._slots.take(adapter) if self._store.ready(adapter) else None
            if taken is None and adapter.failure is None:
                self._later.append(partial(self._compute, compute, adapter, future))
                return
            slot = -1 if taken is None else taken
        try:
            if adapter is not None and adapter.failure is not None:
                raise adapter.failure
            future.set_result(compute(slot))
        except Exception as error:  # theirs, not the loop's
            future.set_exception(error)
        finally:
            if adapter is not None and slot >= 0 and self._slots is not None:
                self._slots.give_back(adapter)

    def _take(self, row: Row, token: int) -> Finish | None:
        """The token is the row's, which leaves the batch where it is its last."""
        self._generated += 1
        if row.matcher is not None:
            row.matcher.accept_token(token)
        if token in self._end_ids and not row.sampling.ignore_end:
            self._scheduler.end(row)
            return "stop"
        row.ids.append(token)
        row.sampler.told(token)
        if len(row.ids) >= row.limit:
            self._scheduler.end(row)
            return "length"
        return None

    def _tell(self) -> bool:
        """Publish the text of tokens that were taken, and end the rows whose answers end with them. False: there were none."""
        some = bool(self._untold)
        for row, token, told, finish in self._untold:
            if not row.done:
                self._publish(row, token, told, finish)
        self._untold.clear()
        return some

    def _publish(self, row: Row, token: int, told: TokenLogprob | None, finish: Finish | None) -> None:
        if finish == "stop":
            self._end(row, "stop")  # the token that ends an answer is no text
            return
        text = row.text.push(token)
        if told is not None:
            row.logprobs.append(told)
        if row.text.stopped is not None:
            self._end(row, "stop", text, told)
        elif finish is not None:
            self._end(row, finish, text, told)
        elif text or told:
            row.stream.put(Delta(text=text, logprobs=() if told is None else (told,)))

    def _end(self, row: Row, finish: Finish, text: str = "", told: TokenLogprob | None = None) -> None:
        row.done = True
        self._scheduler.end(row)
        text += row.text.finish()
        if row.text.stopped is not None and finish != "cancelled":
            finish = "stop"
        completion = Completion(
            ids=tuple(row.answer),
            text=row.text.text,
            finish=finish,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
            logprobs=tuple(row.logprobs),
            adapter_version=None if row.adapter is None else row.adapter.version,
        )
        row.stream.put(Delta(text=text, logprobs=() if told is None else (told,), completion=completion))

    def _fail(self, error: Exception) -> None:
        """Whoever waits is told."""
        self._closed.set()
        for call in self._later:
            self._calls.put(call)
        while not self._calls.empty():
            self._calls.get_nowait()()  # a request that was never looked at is among them
        ended = (row for row, *_ in self._untold)  # of the last step: they are in no queue
        for row in {*self._scheduler.running, *self._scheduler.waiting, *ended}:
            if not row.done:
                row.stream.fail(error)

    def _check_alive(self) -> None:
        if self._closed.is_set():
            raise self._gone()

    def _gone(self) -> ResourceError:
        return ResourceError("the engine is not running", str(self._failure or "It was closed."))

    def _prompt_ids(self, request: Request) -> Sequence[int]:
        if request.conversation is None:
            return request.prompt_ids
        assert self._render is not None, "an engine without a chat template takes token ids"
        return self._render(request.conversation)

    def _matcher(self, grammar: Grammar) -> Any:
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(self._tokenizer, self._runner.vocab_size, self._end_ids)
            return self._grammars.matcher(grammar)
