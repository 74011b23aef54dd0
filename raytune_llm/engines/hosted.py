"""An engine that is another package's, behind our protocol: what packages have in common.

A `Host` computes: it is asked for tokens, and loads adapters. Everything else is the same for all packages and for our own
engine: stop strings and text from tokens, versions of adapters, cancellation, counts. One event loop in a thread of its own asks
the host.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import ServedModels, SGLangEngine, VLLMEngine
from raytune_llm.engines.adapter_limits import CONFIG, WEIGHTS, AdapterLimits
from raytune_llm.engines.engine import AdapterState, Stats
from raytune_llm.engines.native.adapter_store import digest_of
from raytune_llm.engines.native.build import Serving
from raytune_llm.engines.native.text import TextStream
from raytune_llm.engines.requests import Completion, Delta, Finish, Request, Sampling, ScoredToken, Stream, TokenLogprob
from raytune_llm.errors import ConfigError, DataError, ResourceError, UserError
from raytune_llm.models.score_head import refuse_separate_head

WATCH_S = 0.05
"""A request that nobody waits for is given up within this."""
CLOSE_S = 60.0
T = TypeVar("T")


@dataclass(eq=False)
class Version:
    """One version of an adapter: files of ours, so that a folder that is replaced changes nothing of it."""

    name: str
    number: int
    """From 1 on; no two versions have the same, whatever their names."""
    digest: str
    rank: int
    files: tempfile.TemporaryDirectory[str]
    pinned: bool
    users: int = 0
    """Requests that are computed with it, or wait to be."""
    retired: bool = False
    """Nobody can ask for it any more."""

    @property
    def key(self) -> str:
        """What the package knows it by. Packages' prefix caches go by an adapter's name: a new version has another one."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    key: str
    """Of the request."""
    prompt_ids: list[int]
    sampling: Sampling
    max_new_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end the answer; none where sampling.ignore_end."""
    version: Version | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a host made since the last time."""

    ids: Sequence[int]
    """With the token that ends the answer."""
    logprobs: Sequence[TokenLogprob] = ()
    """One a token, where they were asked for."""
    cached_tokens: int = 0
    """Of the prompt, what the prefix cache held."""
    finish: Finish | None = None


class Host(Protocol):
    """Methods are called in the event loop that the host was made in."""

    def answer(self, asked: Asked) -> AsyncGenerator[Tokens, None]:
        """Until its `finish`. Raises a UserError for what the package refuses. Closing it frees what the request holds."""
        ...

    async def load(self, version: Version) -> None:
        """Raises ConfigError for an adapter that the package refuses."""
        ...

    async def unload(self, version: Version) -> None:
        """No request uses it."""
        ...

    def failure(self) -> str | None:
        """Why it computes nothing any more; None while it does."""
        ...

    def close(self) -> None: ...


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
class _Answer:
    request: Request
    stream: Stream
    asked: Asked
    text: TextStream
    begun: bool = False
    """Something of it was made."""
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
    ) -> None:
        """start: makes the host, in the event loop that will ask it."""
        check_installed(limits)
        if serving.scores or serving.adapter is not None:
            rule = "must be native or hf for a reward model, and for an adapter that brings tokens"
            raise ConfigError("engine", rule, got=limits.module)
        if serving.limit is None:
            fix = "For example, serve.max_length=8192."
            raise ConfigError("serve.max_length", "must be given for a model that has no number of positions", got=None, fix=fix)
        self._tokenizer, self._end_ids, self._max_length = serving.tokenizer, tuple(serving.end_ids), serving.limit
        self._limits = limits
        self._lock = threading.Lock()
        """For versions and counts: requests come from any thread."""
        self._versions: dict[str, Version] = {}
        self._adding = threading.Lock()
        self._numbers, self._requests = itertools.count(1), itertools.count(1)
        self._counts = _Counts()
        self._answers: dict[asyncio.Task[None], Stream] = {}
        self._last_step_at = time.monotonic()
        self._closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine", daemon=True)
        self._thread.start()
        try:
            self._host: Host = self._wait(_made(start))
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
            rule = f"can't be asked of {self._limits.package}"
            raise ConfigError("an answer of given tokens alone", rule, fix="Use engine=native or engine=hf.")
        with self._lock:
            version = None
            if request.adapter is not None and (version := self._versions.get(request.adapter)) is None:
                raise ConfigError("the model", "must be the base or an adapter that is loaded", got=request.adapter)
            if version is not None:
                version.users += 1
            self._counts.waiting += 1
        sampling, stream = request.sampling, Stream()
        asked = Asked(
            key=f"r{next(self._requests)}",
            prompt_ids=ids,
            sampling=sampling,
            max_new_tokens=min(sampling.max_new_tokens, self._max_length - len(ids)),
            end_ids=() if sampling.ignore_end else self._end_ids,
            version=version,
        )
        answer = _Answer(request, stream, asked, TextStream(self._tokenizer, sampling.stop))
        self._loop.call_soon_threadsafe(self._begin, answer)
        return stream

    def pooled(self, prompts: Sequence[Sequence[int]], pooling: str, adapter: str | None = None) -> Future[list[list[float]]]:
        rule = f"can't be given by {self._limits.package} from a model that writes answers"
        raise ConfigError(f"the {pooling} of a text", rule, fix="Use engine=native or engine=hf.")

    def answer_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], adapter: str | None = None
    ) -> Future[list[list[ScoredToken]]]:
        rule = f"can't be given by {self._limits.package}, which is asked for new tokens alone"
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
                if before is not None and before.digest == digest and before.pinned == (pinned or before.pinned):
                    files.cleanup()
                    return digest
                self._put(Version(name, next(self._numbers), digest, rank, files, pinned))
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
                    residency="device" if one.users or one.pinned else "host",  # packages don't tell
                    pinned=one.pinned,
                    in_use=one.users,
                )
                for one in self._versions.values()
            ]

    def pin(self, name: str, pinned: bool) -> None:
        """Packages pin an adapter when they load it: it is loaded once more."""
        with self._adding:
            with self._lock:
                version = self._versions.get(name)
            if version is None:
                raise ConfigError("the adapter", "must be one that is loaded", got=name)
            if version.pinned != pinned:
                files = _copied(Path(version.files.name))
                self._put(Version(name, next(self._numbers), version.digest, version.rank, files, pinned))

    def stats(self) -> Stats:
        with self._lock:
            counts = self._counts
            return Stats(
                running=counts.running,
                waiting=counts.waiting,
                waiting_by_reason={"rows": counts.waiting},
                cache_used=float("nan"),  # packages tell it to their own metrics
                prefix_hits=counts.cached,
                prefix_queries=counts.prompted,
                generated_tokens=counts.generated,
                prompt_tokens=counts.prompted - counts.cached,
                preemptions=0,
                adapter_loads=counts.loads,
                adapter_evictions=0,
                steps=counts.steps,
                last_step_at=self._last_step_at,
            )

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._watching.cancel()
        self._wait(self._give_up(ResourceError("the engine was closed before the answer was complete")))
        try:
            self._wait(_called(self._host.close))
        finally:
            self._end_loop()
            for version in self._versions.values():
                version.files.cleanup()

    # In the loop ------------------------------------------------------------------------------------------------------------

    def _begin(self, answer: _Answer) -> None:
        task = self._loop.create_task(self._answer(answer))
        self._answers[task] = answer.stream
        task.add_done_callback(self._answers.pop)

    async def _answer(self, answer: _Answer) -> None:
        ended: Finish | Exception | None = None
        try:
            ended = await self._read(answer)
        except asyncio.CancelledError:
            ended = "cancelled" if answer.stream.cancelled.is_set() else None  # None: it has failed, and was told so
        except UserError as error:
            ended = error
        except Exception as error:  # theirs: whoever waits is told
            ended = ResourceError(f"{self._limits.package} failed ({type(error).__name__}: {error})")
        self._left(answer)
        if isinstance(ended, Exception):
            answer.stream.fail(ended)
        elif ended is not None:
            self._end(answer, ended)

    async def _read(self, answer: _Answer) -> Finish:
        """What the host tells, published as it comes."""
        async with aclosing(self._host.answer(answer.asked)) as told:
            async for tokens in told:
                if not answer.begun:
                    answer.begun = True
                    with self._lock:
                        self._counts.waiting, self._counts.running = self._counts.waiting - 1, self._counts.running + 1
                finish = self._take(answer, tokens)
                if finish is not None:
                    return finish
        raise ResourceError(f"{self._limits.package} ended an answer without a reason", "Ask again")

    def _take(self, answer: _Answer, tokens: Tokens) -> Finish | None:
        """Publish them, up to the end of the answer."""
        text, told = "", []
        finish = None
        answer.cached_tokens = max(answer.cached_tokens, tokens.cached_tokens)
        for at, token in enumerate(tokens.ids):
            with self._lock:
                self._counts.generated += 1
            if token in answer.asked.end_ids:
                finish = "stop"
                break
            answer.ids.append(token)
            text += answer.text.push(token)
            if tokens.logprobs:
                told.append(tokens.logprobs[at])
            if answer.text.stopped is not None:
                finish = "stop"
                break
        answer.logprobs += told
        self._counts.steps += 1
        if text or told:
            answer.stream.put(Delta(text=text, logprobs=tuple(told)))
        return finish or tokens.finish

    def _end(self, answer: _Answer, finish: Finish) -> None:
        text = answer.text.finish()
        if answer.text.stopped is not None and finish != "cancelled":
            finish = "stop"
        version = answer.asked.version
        completion = Completion(
            ids=tuple(answer.ids),
            text=answer.text.text,
            finish=finish,
            prompt_tokens=len(answer.asked.prompt_ids),
            cached_tokens=answer.cached_tokens,
            logprobs=tuple(answer.logprobs),
            adapter_version=None if version is None else version.digest,
        )
        answer.stream.put(Delta(text=text, completion=completion))

    def _left(self, answer: _Answer) -> None:
        version, begun = answer.asked.version, answer.begun
        with self._lock:
            counts = self._counts
            counts.running, counts.waiting = counts.running - begun, counts.waiting - (not begun)
            if begun:
                counts.prompted += len(answer.asked.prompt_ids)
                counts.cached += answer.cached_tokens
            if version is not None:
                version.users -= 1
            drop = version is not None and version.retired and not version.users
        if drop and version is not None and not self._closed.is_set():
            self._loop.create_task(self._drop(version))

    async def _watch(self) -> None:
        """Heartbeat; and requests that nobody waits for."""
        while True:
            await asyncio.sleep(WATCH_S)
            error = self._failure()
            if error is not None:
                self._closed.set()
                await self._give_up(error)
                return
            self._last_step_at = time.monotonic()
            for task, stream in list(self._answers.items()):
                if stream.cancelled.is_set():
                    task.cancel()

    async def _give_up(self, error: ResourceError) -> None:
        for task, stream in list(self._answers.items()):
            stream.fail(error)
            task.cancel()
        await asyncio.gather(*self._answers, return_exceptions=True)

    async def _drop(self, version: Version) -> None:
        await self._host.unload(version)
        version.files.cleanup()

    # What they share --------------------------------------------------------------------------------------------------------

    def _put(self, version: Version) -> None:
        """Loaded, and then in place of the one that has its name."""
        self._wait(self._host.load(version))
        with self._lock:
            before, self._versions[version.name] = self._versions.get(version.name), version
            self._counts.loads += 1
        if before is not None:
            self._retire(before)

    def _retire(self, version: Version) -> None:
        with self._lock:
            version.retired = True
            drop = not version.users
        if drop:
            self._wait(self._drop(version))

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
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
    """What a package can't do for us, before anything is loaded. Raises ConfigError or, where it is missing, ResourceError."""
    if settings.python is None:
        check_installed(limits)
    lacking = f"with engine={limits.module}, which reads a model's own files"
    if model.path is None or model.weights == "random":
        raise ConfigError("model.weights", f"must be a model's {lacking}", got=model.weights)
    if model.adds_tokens:
        raise ConfigError("model.new_tokens", f"can't be added {lacking}", got=model.new_tokens)
    if model.config:
        raise ConfigError("model.config", f"must be empty {lacking}", got=sorted(model.config))
    if quantization.name != "none":
        fix = "Serve a model that was saved quantized, or use engine=native."
        raise ConfigError("quantization", f"must be none {lacking}", got=quantization.name, fix=fix)
    for name, folder in served.adapters.items():
        limits.check(folder, f"serve.adapters.{name}")


def check_installed(limits: AdapterLimits) -> None:
    if importlib.util.find_spec(limits.module) is None:
        extra = f"pip install 'raytune-llm[serve,{limits.module}]'"
        fix = f"Install it in an environment of its own ({extra}), and start `serve` there or set engine.python to its Python."
        raise ResourceError(f"engine={limits.module} needs {limits.package}, which is not installed here", fix)


async def _made(start: Callable[[], Awaitable[Host]]) -> Host:
    return await start()


async def _called(work: Callable[[], None]) -> None:
    work()


def _copied(folder: Path) -> tempfile.TemporaryDirectory[str]:
    kept = tempfile.TemporaryDirectory(prefix="raytune-llm-adapter-")
    for name in (WEIGHTS, CONFIG):
        try:
            shutil.copyfile(folder / name, Path(kept.name) / name)
        except OSError as error:
            kept.cleanup()
            raise DataError(str(folder), f"has no {name}", "Save the adapter as safetensors, as PEFT does.") from error
    return kept
