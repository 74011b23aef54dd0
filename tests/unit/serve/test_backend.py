"""One engine behind the API: how many requests it takes, and what becomes of it when whoever asked is gone."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.requests import Grammar, NotFinite, Request, Sampling, ScoredToken, Stream
from raytune_llm.errors import ConfigError
from raytune_llm.serve.backend import InProcessBackend, ModelFacts, Overloaded
from tests.toy_engine import END, Tokenizer, ToyRunner, answer

ROWS, WAITING = 8, 2


@pytest.fixture
def runner() -> ToyRunner:
    return ToyRunner()


@pytest.fixture
def engine(runner: ToyRunner) -> Iterator[NativeEngine]:
    made = NativeEngine(runner, Tokenizer(), end_ids=[END], max_length=200, max_rows=ROWS, step_tokens=16)
    yield made
    runner.go.set()
    made.close()


@pytest.fixture
def backend(engine: NativeEngine) -> InProcessBackend:
    facts = ModelFacts(name="base", max_length=200, hidden_size=2, scores=False)
    return InProcessBackend(engine, facts, max_waiting=WAITING)


def request(**sampling: Any) -> Request:
    return Request(prompt_ids=[5], sampling=Sampling(**{"max_new_tokens": 4, **sampling}))


async def ids_of(backend: InProcessBackend, asked: Request) -> list[int]:
    (last,) = [delta async for delta in backend.stream(asked) if delta.completion is not None]
    assert last.completion is not None
    return list(last.completion.ids)


def test_a_burst_is_refused_only_beyond_the_rows_and_those_that_may_wait(backend: InProcessBackend, runner: ToyRunner):
    async def ask() -> None:
        runner.go.clear()  # nothing is computed meanwhile
        taken = [asyncio.create_task(ids_of(backend, request())) for _ in range(ROWS + WAITING - 1)]
        taken.append(asyncio.create_task(backend.pooled([[5]], "mean", None)))
        await asyncio.sleep(0)
        for refused in (ids_of(backend, request()), backend.pooled([[5]], "mean", None)):
            with pytest.raises(Overloaded):
                await refused
        runner.go.set()
        *answers, vectors = await asyncio.gather(*taken)
        assert answers == [answer([5], 0, 4)] * (ROWS + WAITING - 1) and vectors == [[5.0, -1.0]]
        assert await ids_of(backend, request()) == answer([5], 0, 4)

    asyncio.run(ask())


def test_a_request_whose_client_goes_while_its_grammar_is_compiled_is_cancelled(
    backend: InProcessBackend, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
):
    entered, may_go = threading.Event(), threading.Event()
    streams: list[Stream] = []
    submit = engine.submit

    def compiling(asked: Request) -> Stream:
        entered.set()
        assert may_go.wait(30)
        streams.append(submit(request(max_new_tokens=190)))  # a grammar needs another tokenizer
        return streams[0]

    async def ask() -> None:
        asking = asyncio.create_task(ids_of(backend, request(grammar=Grammar(kind="json"))))
        await asyncio.to_thread(entered.wait, 30)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        may_go.set()
        while not streams:
            await asyncio.sleep(0.001)
        assert await asyncio.to_thread(streams[0].cancelled.wait, 30)

    monkeypatch.setattr(engine, "submit", compiling)
    asyncio.run(ask())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_vectors_and_log_probabilities_that_are_no_numbers_are_an_error(
    backend: InProcessBackend, runner: ToyRunner, monkeypatch: pytest.MonkeyPatch, wrong: float
):
    monkeypatch.setattr(runner, "pooled", lambda prompts, pooling, slot: [[1.0, wrong] for _ in prompts])
    scored = [[ScoredToken(-1.0, True), ScoredToken(wrong, False)]]
    monkeypatch.setattr(runner, "answer_logprobs", lambda prompts, answers, slot, top: scored)
    with pytest.raises(NotFinite):
        asyncio.run(backend.pooled([[5]], "mean", None))
    with pytest.raises(NotFinite):
        asyncio.run(backend.prompt_logprobs([5, 6, 7], None, 1))


def test_grammars_that_take_long_to_compile_delay_no_other_work(
    backend: InProcessBackend, engine: NativeEngine, monkeypatch: pytest.MonkeyPatch
):
    may_go, submit = threading.Event(), engine.submit

    def compiling(asked: Request) -> Stream:
        assert asked.sampling.grammar is None or may_go.wait(30)
        return submit(request())  # a grammar needs another tokenizer

    async def ask() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waiting = [asyncio.create_task(ids_of(backend, request(grammar=Grammar(kind="json")))) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="must be one that is loaded"):
            await asyncio.wait_for(backend.remove_adapter("other"), 20)
        assert await ids_of(backend, request()) == answer([5], 0, 4)
        may_go.set()
        assert await asyncio.gather(*waiting) == [answer([5], 0, 4)] * 4

    monkeypatch.setattr(engine, "submit", compiling)
    asyncio.run(ask())


def test_an_event_loop_that_ends_before_its_answers_does_not_end_the_engine(
    backend: InProcessBackend, engine: NativeEngine, runner: ToyRunner
):
    loop = asyncio.new_event_loop()
    answers = backend.batches(request(max_new_tokens=100))
    loop.run_until_complete(anext(answers))
    loop.close()
    assert list(engine.submit(request(max_new_tokens=150)).result().ids) == answer([5], 0, 150)


def test_texts_whose_client_goes_are_given_up(backend: InProcessBackend, engine: NativeEngine, runner: ToyRunner):
    async def ask() -> None:
        runner.go.clear()
        running = asyncio.create_task(ids_of(backend, request()))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        asking = asyncio.create_task(backend.pooled([[5]], "mean", None))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        runner.go.set()
        assert await running == answer([5], 0, 4) and not runner.passes
        assert await backend.pooled([[6]], "mean", None) == [[6.0, -1.0]]

    asyncio.run(ask())
