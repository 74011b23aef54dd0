"""Another package's engine (vLLM, SGLang) behind our Engine interface.

A `Host` (host.py) wraps the package: it generates tokens and loads adapters. HostedEngine does what all packages have in
common: detokenizing, stop strings, versions of adapters, cancellation and statistics. It calls the host in an event loop in its
own thread.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import ServedModels, SGLangEngine, VLLMEngine
from raytune_llm.engines.adapter_limits import CONFIG, WEIGHTS, AdapterLimits
from raytune_llm.engines.engine import AdapterState, Stats
from raytune_llm.engines.host import AdapterVersion, GeneratedTokens, Host, HostRequest
from raytune_llm.engines.native.adapter_store import digest_of
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.native.text import TextStream, text_of
from raytune_llm.engines.pins import check_pin
from raytune_llm.engines.requests import Completion, Delta, Finish, Request, ScoredToken, Stream, TokenLogprob
from raytune_llm.errors import ConfigError, DataError, ResourceError, UserError
from raytune_llm.models.score_head import refuse_separate_head

WATCH_S = 0.05
"""Interval of the heartbeat, and the longest time until a cancelled request is aborted."""
CLOSE_S = 60.0
T = TypeVar("T")


@dataclass
class _Counts:
    running: int = 0
    waiting: int = 0
    generated: int = 0
    prompted: int = 0
    cached: int = 0
    loads: int = 0
    steps: int = 0


@dataclass(eq=False)
class _Generation:
    stream: Stream
    host_request: HostRequest
    text: TextStream
    started: bool = False
    """Whether it has tokens."""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached_tokens: int = 0


class HostedEngine:
    """Implements Engine."""

    def __init__(
        self,
        start: Callable[[], Awaitable[Host]],
        serving: Serving,
        *,
        limits: AdapterLimits,
        max_rows: int,
    ) -> None:
        """start: creates the host; it is called in the event loop in which the host will run. max_rows: the host's limit of
        concurrent requests."""
        check_installed(limits)
        if serving.scores or serving.adapter is not None:
            rule = "must be native or hf for a reward model, and for an adapter with new tokens"
            raise ConfigError("engine", rule, got=limits.module)
        if serving.limit is None:
            fix = "For example, serve.max_length=8192."
            raise ConfigError("serve.max_length", "must be set for a model whose config has no maximum length", got=None, fix=fix)
        self._tokenizer, self._end_ids, self._max_length = serving.tokenizer, tuple(serving.end_ids), serving.limit
        self._limits, self.max_rows, self._num_slots = limits, max_rows, serving.max_adapters
        self._lock = threading.Lock()
        """Guards versions and counts, which any thread may change."""
        self._versions: dict[str, AdapterVersion] = {}
        self._adding = threading.Lock()
        self._numbers, self._requests = itertools.count(1), itertools.count(1)
        self._counts = _Counts()
        self._generations: dict[asyncio.Task[None], Stream] = {}
        self._last_step_at = time.monotonic()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._host: Host = self._run(_started(start))
        except BaseException:
            self._end_loop()
            raise
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    # From any thread ------------------------------------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        return self._max_length

    def submit(self, request: Request) -> Stream:
        self._check_alive()
        assert request.conversation is None, "an engine without a chat template takes token ids"
        ids = [int(id) for id in request.prompt_ids]
        if len(ids) + 1 > self._max_length:
            raise ConfigError("the prompt", f"must leave room for an answer within {self._max_length} tokens", got=len(ids))
        if request.sampling.among:
            rule = f"is not supported by {self._limits.package}"
            raise ConfigError("an answer of given tokens alone", rule, fix="Use engine=native or engine=hf.")
        with self._lock:
            version = None
            if request.adapter is not None and (version := self._versions.get(request.adapter)) is None:
                raise ConfigError("the model", "must be the base or an adapter that is loaded", got=request.adapter)
            if version is not None:
                version.users += 1
            self._counts.waiting += 1
        sampling, stream = request.sampling, Stream()
        host_request = HostRequest(
            key=f"r{next(self._requests)}",
            prompt_ids=ids,
            sampling=sampling,
            max_new_tokens=min(sampling.max_new_tokens, self._max_length - len(ids)),
            end_ids=() if sampling.ignore_end else self._end_ids,
            version=version,
        )
        generation = _Generation(stream, host_request, text_of(self._tokenizer, request, ids))
        self._loop.call_soon_threadsafe(self._start, generation)
        return stream

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        rule = f"is not supported by {self._limits.package} for a model that generates text"
        raise ConfigError(f"the {pooling} of a text", rule, fix="Use engine=native or engine=hf.")

    def answer_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        adapter: str | None = None,
        *,
        share_prefixes: bool = False,
        top: int = 0,
    ) -> Future[list[list[ScoredToken]]]:
        rule = f"are not supported with {self._limits.package}, which is only used to generate tokens"
        raise ConfigError("log-probabilities of given answers", rule, fix="Use engine=native or engine=hf.")

    def add_adapter(self, name: str, folder: str | Path, *, pinned: bool = False) -> str:
        self._check_alive()
        refuse_separate_head(folder, f"the adapter {name}")
        with self._adding:
            files = _copied(Path(folder))
            try:
                rank = self._limits.check(files.name, f"the adapter {name}")
                digest = digest_of(Path(files.name))
                with self._lock:
                    before = self._versions.get(name)
                pinned = pinned or (before is not None and before.pinned)
                if before is not None and before.digest == digest and before.pinned == pinned:
                    files.cleanup()
                    return digest
                if pinned:
                    self._check_pin(name)
                self._put(AdapterVersion(name, next(self._numbers), digest, rank, files, pinned))
            except BaseException:
                files.cleanup()
                raise
            return digest

    def remove_adapter(self, name: str) -> None:
        with self._lock:
            version = self._versions.pop(name, None)
        if version is None:
            raise ConfigError("the adapter", "must be one that is loaded", got=name)
        self._retire(version)

    def has_adapter(self, name: str) -> bool:
        with self._lock:
            return name in self._versions

    def adapters(self) -> list[AdapterState]:
        with self._lock:
            return [
                AdapterState(
                    name=one.name,
                    version=one.digest,
                    rank=one.rank,
                    residency="device" if one.users or one.pinned else "host",  # packages don't report it
                    pinned=one.pinned,
                    in_use=one.users,
                )
                for one in self._versions.values()
            ]

    def pin(self, name: str, pinned: bool) -> None:
        """Loads the adapter again, because packages pin an adapter while loading it."""
        with self._adding:
            with self._lock:
                version = self._versions.get(name)
            if version is None:
                raise ConfigError("the adapter", "must be one that is loaded", got=name)
            if version.pinned != pinned:
                if pinned:
                    self._check_pin(name)
                files = _copied(Path(version.files.name))
                self._put(AdapterVersion(name, next(self._numbers), version.digest, version.rank, files, pinned))

    def stats(self) -> Stats:
        with self._lock:
            counts = self._counts
            return Stats(
                running=counts.running,
                waiting=counts.waiting,
                waiting_by_reason={"rows": counts.waiting},
                cache_used=float("nan"),  # packages report it only in their own metrics
                prefix_hits=counts.cached,
                prefix_queries=counts.prompted,
                generated_tokens=counts.generated,
                prompt_tokens=counts.prompted - counts.cached,
                preemptions=0,
                adapter_loads=counts.loads,
                adapter_evictions=0,
                steps=counts.steps,
                last_step_at=self._last_step_at,
                failure=str(self._failure() or "It was closed.") if self._closed.is_set() else None,
            )

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._watching.cancel()
        self._run(self._fail_all(ResourceError("the engine was closed before the answer was complete")))
        try:
            self._run(_called(self._host.close))
        finally:
            self._end_loop()
            for version in self._versions.values():
                version.files.cleanup()

    # In the event loop ------------------------------------------------------------------------------------------------------

    def _start(self, generation: _Generation) -> None:
        task = self._loop.create_task(self._generate(generation))
        self._generations[task] = generation.stream
        task.add_done_callback(self._generations.pop)

    async def _generate(self, generation: _Generation) -> None:
        ended: Finish | Exception | None = None
        try:
            ended = await self._read(generation)
        except asyncio.CancelledError:
            ended = "cancelled" if generation.stream.cancelled.is_set() else None  # None: `_fail_all` has failed the stream
        except UserError as error:
            ended = error
        except Exception as error:  # of the package
            ended = ResourceError(f"{self._limits.package} failed ({type(error).__name__}: {error})")
        self._release(generation)
        if isinstance(ended, Exception):
            generation.stream.fail(ended)
        elif ended is not None:
            self._end(generation, ended)

    async def _read(self, generation: _Generation) -> Finish:
        """Publish the host's tokens as they come, until the answer is complete."""
        async with aclosing(self._host.generate(generation.host_request)) as new_tokens:
            async for tokens in new_tokens:
                if not generation.started:
                    generation.started = True
                    with self._lock:
                        self._counts.waiting, self._counts.running = self._counts.waiting - 1, self._counts.running + 1
                finish = self._publish(generation, tokens)
                if finish is not None:
                    return finish
        raise ResourceError(f"{self._limits.package} ended an answer without a reason", "Ask again")

    def _publish(self, generation: _Generation, tokens: GeneratedTokens) -> Finish | None:
        """Publish tokens up to the end of the answer. Returns the finish reason if it ends."""
        text, logprobs = "", []
        finish = None
        generation.cached_tokens = max(generation.cached_tokens, tokens.cached_tokens)
        for at, token in enumerate(tokens.ids):
            with self._lock:
                self._counts.generated += 1
            if token in generation.host_request.end_ids:
                finish = "stop"
                break
            generation.ids.append(token)
            text += generation.text.push(token)
            if tokens.logprobs:
                logprobs.append(tokens.logprobs[at])
            if generation.text.stopped is not None:
                finish = "stop"
                break
        generation.logprobs += logprobs
        self._counts.steps += 1
        if text or logprobs:
            generation.stream.put(Delta(text=text, logprobs=tuple(logprobs)))
        return finish or tokens.finish

    def _end(self, generation: _Generation, finish: Finish) -> None:
        text = generation.text.finish()
        if generation.text.stopped is not None and finish != "cancelled":
            finish = "stop"
        version = generation.host_request.version
        completion = Completion(
            ids=tuple(generation.ids),
            text=generation.text.text,
            finish=finish,
            prompt_tokens=len(generation.host_request.prompt_ids),
            cached_tokens=generation.cached_tokens,
            logprobs=tuple(generation.logprobs),
            adapter_version=None if version is None else version.digest,
        )
        generation.stream.put(Delta(text=text, completion=completion))

    def _release(self, generation: _Generation) -> None:
        """Update the counts, and unload a retired version after its last request."""
        version, started = generation.host_request.version, generation.started
        with self._lock:
            counts = self._counts
            counts.running, counts.waiting = counts.running - started, counts.waiting - (not started)
            if started:
                counts.prompted += len(generation.host_request.prompt_ids)
                counts.cached += generation.cached_tokens
            if version is not None:
                version.users -= 1
            drop = version is not None and version.retired and not version.users
        if drop and version is not None and not self._closed.is_set():
            self._loop.create_task(self._unload(version))

    async def _watch(self) -> None:
        """Every WATCH_S: check that the package is running, and cancel the requests that callers have cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            error = self._failure()
            if error is not None:
                self._closed.set()
                await self._fail_all(error)
                return
            self._last_step_at = time.monotonic()
            for task, stream in list(self._generations.items()):
                if stream.cancelled.is_set():
                    task.cancel()

    async def _fail_all(self, error: ResourceError) -> None:
        for task, stream in list(self._generations.items()):
            stream.fail(error)
            task.cancel()
        await asyncio.gather(*self._generations, return_exceptions=True)

    async def _unload(self, version: AdapterVersion) -> None:
        await self._host.unload(version)
        version.files.cleanup()

    # Adapters and the loop, from any thread -------------------------------------------------------------------------------

    def _check_pin(self, name: str) -> None:
        with self._lock:
            pinned = [one.name for one in self._versions.values() if one.pinned]
        check_pin(name, pinned, self._num_slots)

    def _put(self, version: AdapterVersion) -> None:
        """Load the version, then let it replace the one of the same name."""
        self._run(self._host.load(version))
        with self._lock:
            before, self._versions[version.name] = self._versions.get(version.name), version
            self._counts.loads += 1
        if before is not None:
            self._retire(before)

    def _retire(self, version: AdapterVersion) -> None:
        with self._lock:
            version.retired = True
            drop = not version.users
        if drop:
            self._run(self._unload(version))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _failure(self) -> ResourceError | None:
        why = self._host.failure()
        return None if why is None else ResourceError(f"{self._limits.package} is not running any more", why)

    def _check_alive(self) -> None:
        if self._closed.is_set():
            raise self._failure() or ResourceError("the engine is not running", "It was closed.")


def check_hosted(
    settings: VLLMEngine | SGLangEngine,
    model: ModelConfig,
    quantization: QuantizationConfig,
    served: ServedModels,
    limits: AdapterLimits,
) -> None:
    """Raises ConfigError for settings that the package can't serve, and ResourceError if it is not installed. Does not load the
    model."""
    if settings.python is None:
        check_installed(limits)
    lacking = f"with engine={limits.module}, which reads a model's own files"
    if model.path is None or model.weights == "random":
        raise ConfigError("model.weights", f"must be a model's {lacking}", got=model.weights)
    if model.adds_tokens:
        raise ConfigError("model.new_tokens", f"can't be added {lacking}", got=model.new_tokens)
    if model.config:
        raise ConfigError("model.config", f"must be empty {lacking}", got=sorted(model.config))
    if model.positions is not None:
        raise ConfigError("model.positions", f"must be null {lacking}", got=model.positions)
    if quantization.replaces_layers:
        fix = "Serve a model that was saved quantized, or use engine=native."
        raise ConfigError("quantization", f"must be none {lacking}", got=quantization.name, fix=fix)
    for name, folder in served.adapters.items():
        limits.check(folder, f"{served.setting}.{name}")


def check_installed(limits: AdapterLimits) -> None:
    """Raises ResourceError if the package is not installed here."""
    if importlib.util.find_spec(limits.module) is None:
        extra = f"pip install 'raytune-llm[serve,{limits.module}]'"
        fix = f"Install it in an environment of its own ({extra}), and start `serve` there or set engine.python to its Python."
        raise ResourceError(f"engine={limits.module} needs {limits.package}, which is not installed here", fix)


async def _started(start: Callable[[], Awaitable[Host]]) -> Host:
    return await start()


async def _called(work: Callable[[], None]) -> None:
    work()


def _copied(folder: Path) -> tempfile.TemporaryDirectory[str]:
    """A copy of an adapter's files. Raises DataError if one is missing."""
    kept = tempfile.TemporaryDirectory(prefix="raytune-llm-adapter-")
    for name in (WEIGHTS, CONFIG):
        try:
            shutil.copyfile(folder / name, Path(kept.name) / name)
        except OSError as error:
            kept.cleanup()
            raise DataError(str(folder), f"has no {name}", "Save the adapter as safetensors, as PEFT does.") from error
    return kept
