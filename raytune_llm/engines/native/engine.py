"""The native engine: a thread that owns the policy and answers many requests concurrently, each with its adapter and sampling.

A step is `schedule, run, sample, publish`. Between two steps, the thread runs calls from other threads (requests, cancellations,
adapters), and one pass of a request that is computed without the cache (passes.py). The loop is modeled on nano-vllm; the forward
pass is `Policy.hidden`, as in training.

If the runner supports it, the next step starts before the host has read the last step's tokens, so that the device doesn't wait
for the host (vLLM's asynchronous scheduling). Until then, a row's new token is a reference to its place on the device. A row that
turns out to have ended is computed once too often.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raytune_llm.engines.engine import AdapterState, Stats
from raytune_llm.engines.native.adapter_store import AdapterStore
from raytune_llm.engines.native.blocks import BlockPool
from raytune_llm.engines.native.grammars import Grammars
from raytune_llm.engines.native.passes import Pass, Passes, in_packs
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.sampler import RowSampler, logprobs, sample
from raytune_llm.engines.native.scheduler import Piece, Scheduler
from raytune_llm.engines.native.scoring import ScoredText, Waves, texts_of
from raytune_llm.engines.native.slots import Adapter, Bank, Slots
from raytune_llm.engines.native.started import Started
from raytune_llm.engines.native.text import text_of
from raytune_llm.engines.requests import (
    Completion,
    Delta,
    Finish,
    Grammar,
    NotFinite,
    Request,
    ScoredToken,
    Stream,
    TokenLogprob,
)
from raytune_llm.errors import ConfigError, ResourceError

LOST = -1
"""In place of a token whose logits are no finite numbers."""
IDLE_S = 0.2
"""Interval of an idle loop's heartbeat."""


class Runner(Protocol):
    """Computes pieces of rows with the policy, over the paged cache."""

    num_blocks: int
    block_size: int
    bank: Bank | None
    vocab_size: int
    device: torch.device

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """The logits at the last token of each piece that samples, float32 [R, V]."""
        ...

    @property
    def sampled(self) -> Callable[[Tensor], None] | None:
        """A function that stores the tokens [R] sampled in a step on the device, for the next step. A decoding row may then have
        -1 - i as its last token, for the i-th of these. None: not supported, the host must read all tokens."""
        ...

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, slot: int) -> list[list[float]]:
        """One vector [D] per prompt, computed with the adapter in the slot; -1: without an adapter."""
        ...

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], slot: int, *, top: int = 0
    ) -> list[list[ScoredToken]]:
        """For each answer, its tokens with their log-probabilities, computed with the adapter in the slot. top: the number of
        likeliest tokens to return for each token."""
        ...

    def scored(self, texts: Sequence[ScoredText]) -> list[ScoredToken]:
        """The scored targets of all texts, in order. Only called if the prefix cache is on."""
        ...

    def read_adapter(self, folder: Path) -> tuple[Any, int]:
        """(weights in the bank's form, rank). Raises UserError for an adapter that does not fit."""
        ...


class NativeEngine:
    """Implements Engine. Public methods may be called from any thread."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        *,
        end_ids: Sequence[int],
        max_length: int,
        max_rows: int = 64,
        step_tokens: int = 512,
        pass_tokens: int | None = None,
        max_host_adapters: int = 256,
        prefix_cache: bool = True,
        own_adapter: str | None = None,
        render: Callable[[Any], Sequence[int]] | None = None,
        threaded: bool = True,
        overlaps: bool | None = None,
    ) -> None:
        """max_length: maximum tokens of a prompt and its answer. max_rows, step_tokens: maximum requests and tokens in a step.
        pass_tokens: maximum tokens of several texts that are computed together without the cache; None: step_tokens.
        own_adapter: the name of the adapter that is part of the model and answers all requests. render: Conversation -> prompt
        ids. threaded: if False, only `generate` may be called, and it computes in the caller's thread. overlaps: detokenize a
        step while the device computes the next one; None: if the device is a GPU.
        """
        self._overlaps = runner.device.type == "cuda" if overlaps is None else overlaps
        self._runner, self._tokenizer, self._render = runner, tokenizer, render
        self._end_ids, self._own_adapter = tuple(id for id in end_ids if id < runner.vocab_size), own_adapter
        self.max_rows, self._pass_tokens = max_rows, pass_tokens or step_tokens
        self._max_length = min(max_length, runner.num_blocks * runner.block_size)
        self._blocks = BlockPool(runner.num_blocks, runner.block_size, prefix_cache=prefix_cache)
        self._slots = None if runner.bank is None else Slots(runner.bank)
        self._scheduler = Scheduler(self._blocks, self._slots, max_rows=max_rows, step_tokens=max(step_tokens, max_rows))
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Calls from other threads; the loop runs them between two steps."""
        self._unpublished: list[tuple[Row, int, TokenLogprob | None, Finish | None]] = []
        """Tokens that were read but not published yet: (row, token, its log-probability, finish reason)."""
        self._started: Started | None = None
        """The step whose tokens the host has not read yet."""
        self._store = AdapterStore(
            runner.read_adapter,
            max_host=max_host_adapters,
            num_slots=0 if runner.bank is None else runner.bank.num_slots,
            on_read=lambda: self._calls.put(lambda: None),
        )
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
        adapter = self._named(request.adapter)
        sampling = request.sampling
        ids = [int(id) for id in self._prompt_ids(request)]
        if len(ids) + 1 > self._max_length:
            raise ConfigError("the prompt", f"must leave room for an answer within {self._max_length} tokens", got=len(ids))
        self._check_ids(ids)
        self._check_ids([token for token, _ in sampling.logit_bias])
        matcher = None if sampling.grammar is None else self._matcher(sampling.grammar)
        stream = Stream()
        row = Row(
            stream=stream,
            sampling=sampling,
            sampler=RowSampler(sampling, self._end_ids, ids),
            text=text_of(self._tokenizer, request, ids),
            ids=list(ids),
            prompt_tokens=len(ids),
            limit=min(len(ids) + sampling.max_new_tokens, self._max_length),
            adapter=adapter,
            matcher=matcher,
        )
        self._calls.put(partial(self._scheduler.add, row))
        if self._closed.is_set():  # the loop may have ended before it saw the call
            stream.fail(self._gone())
        return stream

    def generate(self, requests: Sequence[Request], on_left: Callable[[int], object] = lambda left: None) -> list[Completion]:
        """One completion per request, in their order. Blocks until all are complete. on_left: without a thread, called after each
        step with the number of requests that are not complete."""
        streams = [self.submit(request) for request in requests]
        if self._thread is None:
            self._answer_all(on_left)
        return [stream.result() for stream in streams]

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        for ids in prompts:
            self._check_ids(ids)
        packs = [prompts[pack] for pack in in_packs([len(ids) for ids in prompts], self._pass_tokens)]
        passes = (partial(self._runner.pooled, pack, pooling) for pack in packs)
        return self._between_steps(passes, self._named(adapter))

    def answer_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        adapter: str | None = None,
        *,
        share_prefixes: bool = False,
        top: int = 0,
    ) -> Future[list[list[ScoredToken]]]:
        sizes = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        longest = max(sizes, default=0)
        if longest - 1 > self._max_length:  # the last token is only predicted
            raise ConfigError("a prompt and its answer", f"must have at most {self._max_length + 1} tokens", got=longest)
        for ids in (*prompts, *answers):
            self._check_ids(ids)
        version = self._named(adapter)
        if share_prefixes and self._blocks.shares:  # computed by the cache's waves
            passes = self._over_the_cache(prompts, answers, "" if version is None else version.version)
        else:
            packs = in_packs(sizes, self._pass_tokens)
            passes = [partial(self._runner.answer_logprobs, prompts[pack], answers[pack], top=top) for pack in packs]
        return self._between_steps(passes, version)

    def _between_steps(self, passes: Iterable[Pass], version: Adapter | None) -> Future[list[Any]]:
        """The results of all passes, which the engine's thread computes with the adapter, or without one."""
        self._check_alive()
        request = Passes(iter(passes), version)
        if not request.left:
            request.complete()
            return request.future
        self._calls.put(partial(self._scheduler.passes.append, request))
        if self._closed.is_set():  # the loop may have ended before it saw the call
            request.fail(self._gone())
        return request.future

    def _named(self, name: str | None) -> Adapter | None:
        """The adapter with this name; None: no adapter. Raises ConfigError for an unknown name."""
        if name is None or name == self._own_adapter:
            return None
        if (adapter := self._store.get(name)) is None:
            raise ConfigError("the model", "must be the base or an adapter that is loaded", got=name)
        return adapter

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        self._check_alive()
        if self._slots is None:
            rule = f"can't be added to {self._own_adapter or 'this model'}, which is served alone"
            raise ConfigError("the adapter", rule, got=name, fix="Start another engine for it, or set engine=hf.")
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
        self._store.pin(name, pinned)

    def stats(self) -> Stats:
        scheduler, slots = self._scheduler, self._slots
        passes = [one.waits for one in tuple(scheduler.passes)]
        return Stats(
            running=len(scheduler.running) + passes.count(False),
            waiting=len(scheduler.waiting) + passes.count(True) + self._calls.qsize(),
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
            adapter_slots=0 if slots is None else slots.bank.num_slots,
            waiting_adapters=scheduler.waiting_adapters(),
            failure=str(self._gone()) if self._closed.is_set() else None,
        )

    def close(self) -> None:
        self._closed.set()
        self._calls.put(lambda: None)
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    # In the engine's thread ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            with torch.no_grad():
                worked = False
                while not self._closed.is_set():
                    self._run_calls(wait=not worked)
                    self._last_step_at = time.monotonic()
                    passed = self._compute_pass()
                    worked = self._step() or passed
            self._fail(ResourceError("the engine was closed before the answer was complete"))
        except Exception as error:  # passed on to the callers that wait for answers, since nobody joins the thread
            self._failure = error
            self._fail(self._gone())
            raise

    @torch.no_grad()
    def _answer_all(self, on_left: Callable[[int], object]) -> None:
        """Compute steps in the caller's thread until every request is complete."""
        self._run_calls(wait=False)
        while self._scheduler.running or self._scheduler.waiting or self._started or self._unpublished:
            worked = self._step()
            assert worked, "a row that fits the cache can be computed"
            on_left(len(self._scheduler.running) + len(self._scheduler.waiting))

    def _step(self) -> bool:
        """Compute one step. Returns False if there was nothing to do."""
        if self._started is not None and not self._may_run_ahead(self._started):
            self._read_tokens()
        pieces = self._scheduler.schedule()
        started = self._start(pieces) if pieces else None
        read = self._read_tokens()  # of the step before, while the device computes this one; so is their text
        published = self._publish_all()
        self._started = started
        if started is None:
            return read or published
        if not self._overlaps:
            self._read_tokens()
            self._publish_all()
        self._steps += 1
        return True

    def _may_run_ahead(self, started: Started) -> bool:
        """Whether the next step can be scheduled before the running step's tokens are read, because it won't preempt a row."""
        enough = self._blocks.num_free >= len(self._scheduler.running)
        return self._runner.sampled is not None and enough and not any(row.needs_tokens for row in started.rows)

    def _start(self, pieces: Sequence[Piece]) -> Started:
        """Run the pieces and sample. Until it is read, each row's new token is a reference to its place on the device."""
        logits_RV = self._runner.run(pieces)
        rows = [piece.row for piece in pieces if piece.samples]
        tokens_R = told_R = torch.empty(0, dtype=torch.int64)
        scored: dict[Row, TokenLogprob] = {}
        if rows:
            lost_R = ~(logits_RV.amax(dim=1) < torch.inf)  # NaN too; before the logits are changed
            tokens_R, scored = self._sample(logits_RV, rows)
            told_R = tokens_R.masked_fill(lost_R, LOST)
        if self._runner.sampled is not None:
            self._runner.sampled(tokens_R)
        started = Started(pieces, rows, told_R, scored)
        for piece in pieces:
            piece.row.computed = piece.stop
        for number, row in enumerate(rows):
            row.ids.append(-1 - number)
            row.sampler.drawn += 1
        return started

    def _read_tokens(self) -> bool:
        """Give the rows of the started step their tokens. Returns False if there is no such step."""
        started, self._started = self._started, None
        if started is None:
            return False
        tokens = started.tokens()
        for piece in started.pieces:
            if not piece.row.ended:
                self._prompted += max(0, min(piece.stop, piece.row.prompt_tokens) - piece.start)
                self._scheduler.computed(piece)
        for row, place, token in zip(started.rows, started.places, tokens, strict=True):
            if not row.ended:
                self._unpublished.append((row, token, started.scored.get(row), self._take(row, place, token)))
        return True

    def _sample(self, logits_RV: Tensor, rows: Sequence[Row]) -> tuple[Tensor, dict[Row, TokenLogprob]]:
        """The next token of each row, int64 [R], and log-probabilities for rows that request them. Changes logits_RV in place."""
        asking = [number for number, row in enumerate(rows) if row.sampling.logprobs is not None]
        unchanged_RV = logits_RV[asking] if asking else None  # a copy
        bitmask_RW = None if self._grammars is None else self._grammars.bitmask([row.matcher for row in rows])
        if bitmask_RW is not None:
            bitmask_RW = bitmask_RW.to(logits_RV.device, non_blocking=True)
        tokens_R = sample(logits_RV, [row.sampler for row in rows], bitmask_RW)
        scored: dict[Row, TokenLogprob] = {}
        if unchanged_RV is not None:
            most = max(rows[number].sampling.logprobs or 0 for number in asking)
            for number, one in zip(asking, logprobs(unchanged_RV, tokens_R[asking], most), strict=True):
                scored[rows[number]] = replace(one, top=one.top[: rows[number].sampling.logprobs])
        return tokens_R, scored

    def _run_calls(self, *, wait: bool) -> None:
        """Run other threads' calls, then end requests that were cancelled or whose adapter can't be read. wait: wait up to IDLE_S
        seconds for a call."""
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
            elif failure := self._failure_of(row.adapter):
                row.done = True
                self._leave(row, row.known)
                row.stream.fail(failure)
        for one in tuple(self._scheduler.passes):
            failure = self._failure_of(one.adapter)
            if one.future.cancelled() or failure is not None:
                self._scheduler.passes.remove(one)
            if failure is not None:
                one.fail(failure)

    def _failure_of(self, adapter: Adapter | None) -> Exception | None:
        """Why the adapter's weights can't be read again, if so. Starts reading them if they are only on disk."""
        return None if adapter is None or self._store.ready(adapter) else adapter.failure

    def _compute_pass(self) -> bool:
        """Compute one pass of a request without the cache. Returns False if there is none, or if all wait for slots."""
        one = self._scheduler.next_passes()
        if one is None:
            return False
        failure = None
        try:
            one.compute()
        except Exception as error:  # passed on to the future's caller; the loop continues
            failure = error
        self._scheduler.give_back_slot(one)
        if failure is not None or not one.left:
            self._scheduler.passes.remove(one)
            one.complete() if failure is None else one.fail(failure)
        return True

    def _over_the_cache(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], version: str) -> Iterator[Pass]:
        """One pass per wave, and a last one that returns all answers' tokens. version: the adapter's digest."""
        texts = texts_of(prompts, answers, version, self._blocks.block_size)
        waves = Waves(texts, self._blocks, self._runner, limit=self._pass_tokens)

        def wave(slot: int) -> Sequence[Any]:
            waves.compute(slot)
            return ()

        def answered(slot: int) -> Sequence[Any]:
            self._scheduler.prefix_hits += sum(text.computed for text in texts)
            self._scheduler.prefix_queries += sum(len(text.ids) for text in texts)
            tokens = iter(waves.scored())
            return [[next(tokens) for _ in answer] for answer in answers]

        while waves.left:
            yield wave
        yield answered

    def _take(self, row: Row, place: int, token: int) -> Finish | None:
        """Put a sampled token into its place in the row. If it is the last one, the row leaves the batch, and the finish reason
        is returned."""
        if token == LOST:
            row.done = True
            self._leave(row, place)
            row.stream.fail(NotFinite(self._own_adapter if row.adapter is None else row.adapter.name))
            return None
        self._generated += 1
        if row.matcher is not None and not row.matcher.accept_token(token):
            row.done = True
            self._leave(row, place)
            row.stream.fail(ConfigError("the grammar", "must allow a text: it came where no token is left"))
            return None
        ends = not row.sampling.ignore_end or (row.matcher is not None and row.matcher.is_terminated())
        if token in self._end_ids and ends:
            self._leave(row, place)
            return "stop"
        row.ids[place] = token
        row.sampler.count(token)
        if place + 1 >= row.limit:
            self._leave(row, place + 1)
            return "length"
        return None

    def _leave(self, row: Row, length: int) -> None:
        """Take a row out of the batch. length: the number of its valid tokens; later ones are dropped."""
        row.ended = True
        del row.ids[length:]
        self._scheduler.end(row)

    def _publish_all(self) -> bool:
        """Publish the unpublished tokens, and end the rows that are complete. Returns False if there were none."""
        some = bool(self._unpublished)
        for row, token, logprob, finish in self._unpublished:
            if not row.done:
                self._publish(row, token, logprob, finish)
        self._unpublished.clear()
        return some

    def _publish(self, row: Row, token: int, logprob: TokenLogprob | None, finish: Finish | None) -> None:
        if finish == "stop":
            self._end(row, "stop")  # the stop token is not part of the text
            return
        text = row.text.push(token)
        if logprob is not None:
            row.logprobs.append(logprob)
        if row.text.stopped is not None:
            self._end(row, "stop", text, logprob)
        elif finish is not None:
            self._end(row, finish, text, logprob)
        elif text or logprob:
            row.stream.put(Delta(text=text, logprobs=() if logprob is None else (logprob,)))

    def _end(self, row: Row, finish: Finish, text: str = "", logprob: TokenLogprob | None = None) -> None:
        row.done = True
        self._leave(row, row.known)
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
            queued_s=row.queued_s,
            adapter_version=None if row.adapter is None else row.adapter.version,
        )
        row.stream.put(Delta(text=text, logprobs=() if logprob is None else (logprob,), completion=completion))

    def _fail(self, error: Exception) -> None:
        """End the engine: every request and pending call gets the error."""
        self._closed.set()
        while not self._calls.empty():
            self._calls.get_nowait()()  # may add requests, which are failed below
        ended = (row for row, *_ in self._unpublished)  # they may have left the scheduler
        for row in {*self._scheduler.running, *self._scheduler.waiting, *ended}:
            if not row.done:
                row.stream.fail(error)
        for one in self._scheduler.passes:
            one.fail(self._gone())

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Raises ConfigError for a token that the model lacks, which would end the engine: tokenizers may have more."""
        size = self._runner.vocab_size
        if min(ids, default=0) < 0 or max(ids, default=0) >= size:
            got = next(id for id in ids if not 0 <= id < size)
            raise ConfigError("token ids", f"must be from 0 to {size - 1}, the model's last", got=got)

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
