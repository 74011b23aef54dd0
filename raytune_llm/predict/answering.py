"""Answers blocks of questions with an engine in this process, or with Ray actors that have one engine each. [ray]

Several blocks are answered concurrently, so that an engine's batch stays full between blocks. They are returned in order.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from raytune_llm import session
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.resources import Cluster, Local, ResourcesConfig
from raytune_llm.config.serve import EngineConfig, ServedModels
from raytune_llm.engines.engine import Engine
from raytune_llm.engines.questions import BLOCK_QUESTIONS, Answered, Answering, Block, answer_block
from raytune_llm.errors import ConfigError, RunLost, UserError, first_line
from raytune_llm.runs.pulse import PULSE_GROUP, Beating, Frozen, Pulse
from raytune_llm.runs.remote_task import wait_for_places

log = logging.getLogger(__name__)
ROWS_AHEAD = 4
"""Requests that are submitted at once, as a multiple of the engine's rows, so that a free row always has a next request."""


@dataclass(frozen=True)
class EngineSettings:
    """The settings from which any process can build an engine."""

    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    served: ServedModels

    def check(self, *, base: str | None = None) -> None:
        """Raises UserError for what fails for reasons that are known without weights. base: the name of the setting that also
        asks the base."""
        from raytune_llm.serve.engines import check_base, check_servable  # torch

        check_servable(self.model, self.quantization, self.engine, self.served)
        if base is not None:
            check_base(self.served, self.engine, base)

    @property
    def blocks_at_once(self) -> int:
        return -(-ROWS_AHEAD * self.engine.max_rows // BLOCK_QUESTIONS)

    def build(self) -> Engine:
        from raytune_llm.serve.engines import build_engine  # torch

        engine, facts = build_engine(self.model, self.quantization, self.engine, self.served)
        if facts.scores:
            engine.close()
            fix = "raytune-llm serve answers /v1/score with it."
            raise ConfigError("model.path", "must write texts: it is a reward model", got=self.model.path, fix=fix)
        return engine


# Here ---------------------------------------------------------------------------------------------------------------------


class AnsweringHere:
    def __init__(self, engine: Engine, blocks_at_once: int, pool: ThreadPoolExecutor) -> None:
        self.max_length = engine.max_length
        self._engine, self._blocks_at_once, self._pool = engine, blocks_at_once, pool

    def __call__(self, blocks: Iterable[Block]) -> Iterator[list[Answered]]:
        waiting: deque[Future[list[Answered]]] = deque()
        for block in blocks:
            waiting.append(self._pool.submit(answer_block, self._engine, block))
            if len(waiting) >= self._blocks_at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def _answering_here(settings: EngineSettings, resources: Any) -> Iterator[Answering]:
    engine = settings.build()
    pool = ThreadPoolExecutor(settings.blocks_at_once, "predict")
    try:
        yield AnsweringHere(engine, settings.blocks_at_once, pool)
    finally:
        engine.close()  # first, so that threads that wait for an answer get an error and end
        pool.shutdown(cancel_futures=True)


# On Ray -------------------------------------------------------------------------------------------------------------------


class Answerer(Beating):
    """An actor with one engine, which it builds in its first call. A UserError is returned, not raised, because Ray would wrap it
    in an error of its own."""

    def __init__(self, settings: EngineSettings, num_threads: int) -> None:
        self._settings, self._num_threads = settings, num_threads
        self._engine: Engine | None = None
        self._building = Lock()

    def max_length(self) -> int | UserError:
        try:
            return self._built().max_length
        except UserError as error:
            return error

    def answer(self, block: Block) -> list[Answered] | UserError:
        try:
            return answer_block(self._built(), block)
        except UserError as error:
            return error

    def _built(self) -> Engine:
        with self._building:
            if self._engine is None:
                import torch

                torch.set_num_threads(max(1, self._num_threads))
                self._engine = self._settings.build()
            return self._engine


class AnsweringOnRay:
    def __init__(self, actors: Sequence[Any], blocks_at_once: int, each: Mapping[str, float], limit_s: float) -> None:
        """each: CPUs and GPUs of an actor. limit_s: how long its process may not answer (resources.collective_timeout_s)."""
        import ray

        self._ray, self._actors, self._blocks_at_once, self._each = ray, actors, blocks_at_once, each
        self._pulses = [Pulse(actor, f"worker {number}", limit_s) for number, actor in enumerate(actors)]
        asked = [actor.max_length.remote() for actor in actors]
        self.max_length = min(self._value(reference, number) for number, reference in enumerate(asked))

    def __call__(self, blocks: Iterable[Block]) -> Iterator[list[Answered]]:
        """Each block goes to the actor with the fewest unanswered blocks. Answers are yielded in the order of the blocks."""
        waiting: deque[tuple[Any, int]] = deque()
        running: dict[Any, int] = {}
        for block in blocks:
            done, _ = self._ray.wait(list(running), num_returns=len(running), timeout=0) if running else ([], [])
            for reference in done:
                del running[reference]
            loads = [list(running.values()).count(number) for number in range(len(self._actors))]
            number = loads.index(min(loads))
            reference = self._actors[number].answer.remote(block)
            waiting.append((reference, number))
            running[reference] = number
            if len(waiting) >= self._blocks_at_once * len(self._actors):
                yield self._value(*waiting.popleft())
        while waiting:
            yield self._value(*waiting.popleft())

    def _value(self, reference: Any, number: int) -> Any:
        """The answer of this actor. If its process dies, or stands still and is ended here, Ray repeats the call."""
        while True:
            try:
                value = self._ray.get(self._pulses[number].wait([reference]))
                break
            except Frozen as frozen:
                log.warning("%s; it is replaced", frozen)
                self._ray.kill(self._actors[number], no_restart=False)
                wait_for_places([self._actors[number]], self._each)
            except self._ray.exceptions.RayActorError as error:
                fix = "What is answered is kept: the same command answers the rest."
                raise RunLost(f"a worker was lost too often ({first_line(error)})", fix) from None
        if isinstance(value, UserError):
            raise value
        return value


@contextmanager
def _answering_on_ray(settings: EngineSettings, resources: Local | Cluster) -> Iterator[Answering]:
    session.connect(resources)
    import ray

    from raytune_llm.runs.group_size import check_fits, group_size

    size = group_size(resources)
    check_fits(size)
    groups: dict[str, Any] = {"concurrency_groups": PULSE_GROUP}  # which Ray takes here, and not as an option below
    actor: Any = ray.remote(**groups)(Answerer).options(
        num_cpus=size.cpus,
        num_gpus=size.gpus,
        max_restarts=resources.max_failures,
        max_task_retries=resources.max_failures,
        max_concurrency=settings.blocks_at_once + 1,
    )
    actors: list[Any] = [actor.remote(settings, int(size.cpus)) for _ in range(size.workers)]
    try:
        wait_for_places(actors, size.each)
        yield AnsweringOnRay(actors, settings.blocks_at_once, size.each, resources.collective_timeout_s)
    finally:
        for one in actors:
            ray.kill(one)


PLACES: dict[str, Callable[[EngineSettings, Any], AbstractContextManager[Answering]]] = {
    "inline": _answering_here,
    "local": _answering_on_ray,
    "cluster": _answering_on_ray,
}


def answering(settings: EngineSettings, resources: ResourcesConfig) -> AbstractContextManager[Answering]:
    return PLACES[resources.name](settings, resources)
