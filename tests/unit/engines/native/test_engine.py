"""The engine's bookkeeping with a toy runner: its cache holds what was written, and a wrong block, order or adapter shows at
once.

The next token is a function of all tokens that the cache holds and of the adapter's weights.
tests/invariant/test_served_equals_trained.py holds the same of real models.
"""

from __future__ import annotations

import math
import random
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_llm.engines.native.adapter_store import AdapterStore
from raytune_llm.engines.native.engine import NativeEngine
from raytune_llm.engines.native.scheduler import Piece
from raytune_llm.engines.requests import Request, Sampling
from raytune_llm.errors import ConfigError, DataError, ResourceError
from tests.toy_engine import END, WORDS, Tokenizer, ToyRunner, V, adapter_folder, answer, following


@pytest.fixture
def engine_of():
    made: list[NativeEngine] = []

    def make(runner: ToyRunner, **settings: Any) -> NativeEngine:
        settings = {"end_ids": [END], "max_length": 200, "max_rows": 8, "step_tokens": 16, **settings}
        made.append(NativeEngine(runner, Tokenizer(), **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("seed", range(18))
def test_each_row_is_what_it_would_be_alone(engine_of, tmp_path: Path, seed: int):
    """Few blocks, few slots, few tokens a step: rows are cut, preempted, find each other's beginnings and wait for slots."""
    draw = random.Random(seed)
    runner = ToyRunner(num_blocks=draw.choice([16, 24, 64]), slots=draw.choice([1, 2, 4]), runs_ahead=seed % 3 == 2)
    sizes = {"max_rows": draw.choice([2, 8]), "step_tokens": draw.choice([8, 16, 64])}
    engine = engine_of(runner, **sizes, max_length=60, overlaps=seed % 2 == 1 or seed % 3 == 2)
    for number in range(1, 7):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    beginnings = [[draw.randrange(1, V) for _ in range(draw.randrange(1, 20))] for _ in range(3)]
    asked = []
    for _ in range(40):
        prompt = [*draw.choice(beginnings), *(draw.randrange(1, V) for _ in range(draw.randrange(1, 12)))]
        asked.append((prompt, draw.randrange(7), draw.randrange(1, 20)))
    streams = []
    for prompt, weights, tokens in asked:
        sampling = Sampling(max_new_tokens=tokens)
        streams.append(engine.submit(Request(prompt_ids=prompt, adapter=f"a{weights}" if weights else None, sampling=sampling)))
        if draw.random() < 0.2:
            time.sleep(0.001)
    for (prompt, weights, tokens), stream in zip(asked, streams, strict=True):
        completion = stream.result()
        assert list(completion.ids) == answer(prompt, weights, tokens)
        assert completion.finish == "length" and completion.prompt_tokens == len(prompt)
    stats = engine.stats()
    assert stats.running == stats.waiting == 0 and stats.cache_used == 0
    assert stats.generated_tokens == sum(tokens for *_, tokens in asked)


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_end_while_the_next_step_runs_are_what_they_would_be_alone(engine_of, seed: int):
    """Rows end by a stop token, by a text, by their length, or are given up, and steps start before the host knows it."""
    draw = random.Random(seed)
    ends = (3, 11, 40, 77)
    runner = ToyRunner(num_blocks=draw.choice([24, 64]), runs_ahead=True)
    engine = engine_of(runner, end_ids=ends, max_length=60, overlaps=True)
    asked = []
    for _ in range(60):
        prompt = [draw.randrange(1, V) for _ in range(draw.randrange(1, 9))]
        stop = (WORDS[draw.randrange(1, V)],) if draw.random() < 0.3 else ()
        more = draw.choice([{}, {}, {}, {"logprobs": 1}, {"presence_penalty": 1e-9}, {"min_new_tokens": 2}])
        asked.append((prompt, Sampling(max_new_tokens=draw.randrange(1, 30), stop=stop, **more)))
    streams = [engine.submit(Request(prompt_ids=prompt, sampling=sampling)) for prompt, sampling in asked]
    given_up = [stream for stream in streams if draw.random() < 0.1]
    for stream in given_up:
        stream.cancel()
    for (prompt, sampling), stream in zip(asked, streams, strict=True):
        completion = stream.result()
        if stream in given_up and completion.finish == "cancelled":
            continue
        ids, text = [], ""
        finish = "length"
        for number in range(sampling.max_new_tokens):
            token = following([*prompt, *ids], 0, but=ends if number < sampling.min_new_tokens else ())
            if token in ends:
                finish = "stop"
                break
            ids.append(token)
            text += WORDS[token]
            if sampling.stop and text.endswith(sampling.stop[0]):
                text, finish = text.removesuffix(sampling.stop[0]), "stop"
                break
        assert (list(completion.ids), completion.text, completion.finish) == (ids, text, finish)
    assert engine.stats().running == engine.stats().waiting == 0 and engine.stats().cache_used == 0
    ahead = [piece for step in runner.steps for piece in step]
    assert len(ahead) > len(streams)


def test_a_step_computes_at_most_its_tokens_and_prompts_come_in_chunks(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner, step_tokens=8)
    runner.go.clear()
    streams = [engine.submit(Request(prompt_ids=[n + 1] * 30, sampling=Sampling(max_new_tokens=3))) for n in range(3)]
    runner.go.set()
    assert all(len(stream.result().ids) == 3 for stream in streams)
    assert max(sum(piece.stop - piece.start for piece in step) for step in runner.steps) <= 8


def test_what_a_stream_tells_is_the_answer(engine_of):
    engine = engine_of(ToyRunner())
    deltas = list(engine.submit(Request(prompt_ids=[5, 6], sampling=Sampling(max_new_tokens=9, logprobs=2))))
    completion = deltas[-1].completion
    assert completion is not None
    assert "".join(delta.text for delta in deltas) == completion.text == Tokenizer().decode(list(completion.ids))
    assert [one for delta in deltas for one in delta.logprobs] == list(completion.logprobs)
    assert len(completion.logprobs) == 9 and all(len(one.top) == 2 for one in completion.logprobs)


def test_a_stop_string_over_tokens_ends_the_answer(engine_of):
    engine = engine_of(ToyRunner())
    whole = answer([3, 4], 0, 8)
    stop = WORDS[whole[3]] + WORDS[whole[4]]
    completion = engine.submit(Request(prompt_ids=[3, 4], sampling=Sampling(max_new_tokens=8, stop=(stop,)))).result()
    assert completion.text == Tokenizer().decode(whole[:3]) and completion.finish == "stop"


def test_an_end_token_ends_the_answer_and_is_no_part_of_it(engine_of):
    whole = answer([3, 4], 0, 4)
    engine = engine_of(ToyRunner(), end_ids=[whole[2]])
    completion = engine.submit(Request(prompt_ids=[3, 4], sampling=Sampling(max_new_tokens=8))).result()
    assert list(completion.ids) == whole[:2] and completion.finish == "stop"


def test_a_cancelled_row_is_gone_before_the_next_step(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner)
    stream = engine.submit(Request(prompt_ids=[3, 4], sampling=Sampling(max_new_tokens=190)))
    next(iter(stream))
    runner.go.clear()
    time.sleep(0.05)  # the step that is being computed
    stream.cancel()
    runner.go.set()
    steps = len(runner.steps)
    assert stream.result().finish == "cancelled"
    assert len(runner.steps) <= steps + 1 and engine.stats().cache_used == 0


def test_a_prefix_that_is_held_is_not_computed_again(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner)
    prompt = list(range(1, 30))
    first, second = (engine.submit(Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=4))).result() for _ in range(2))
    assert first.ids == second.ids
    assert (first.cached_tokens, second.cached_tokens) == (0, 28)


def test_a_folder_replaced_under_its_name_is_another_version(engine_of, tmp_path: Path):
    runner = ToyRunner(slots=1)
    engine = engine_of(runner)
    prompt = list(range(1, 12))
    version = engine.add_adapter("mine", adapter_folder(tmp_path / "a", 3))
    old = engine.submit(Request(prompt_ids=prompt, adapter="mine", sampling=Sampling(max_new_tokens=100)))
    next(iter(old))
    assert engine.add_adapter("mine", adapter_folder(tmp_path / "a", 4)) != version
    new = engine.submit(Request(prompt_ids=prompt, adapter="mine", sampling=Sampling(max_new_tokens=10)))
    assert list(old.result().ids) == answer(prompt, 3, 100)
    assert list(new.result().ids) == answer(prompt, 4, 10)


def test_an_adapter_that_was_removed_finishes_its_answers(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=1))
    engine.add_adapter("mine", adapter_folder(tmp_path / "a", 3))
    stream = engine.submit(Request(prompt_ids=[1, 2], adapter="mine", sampling=Sampling(max_new_tokens=100)))
    engine.remove_adapter("mine")
    assert list(stream.result().ids) == answer([1, 2], 3, 100)
    with pytest.raises(ConfigError, match="adapter that is loaded"):
        engine.submit(Request(prompt_ids=[1, 2], adapter="mine"))
    assert engine.adapters() == []


def test_a_bad_adapter_changes_nothing(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner())
    for folder in (adapter_folder(tmp_path / "a", -1), tmp_path / "nothing"):
        with pytest.raises(DataError):
            engine.add_adapter("mine", folder)
    assert list(engine.submit(Request(prompt_ids=[1], sampling=Sampling(max_new_tokens=3))).result().ids) == answer([1], 0, 3)


def test_sixteen_adapters_over_two_slots_all_get_their_turn_while_one_is_never_idle(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(num_blocks=256, slots=2), max_rows=4)
    for number in range(1, 17):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    busy = [
        engine.submit(Request(prompt_ids=[1, 2], adapter=f"a{1 + n % 2}", sampling=Sampling(max_new_tokens=100, seed=n)))
        for n in range(60)
    ]
    late = [
        engine.submit(Request(prompt_ids=[3], adapter=f"a{number}", sampling=Sampling(max_new_tokens=5)))
        for number in range(3, 17)
    ]
    base = engine.submit(Request(prompt_ids=[4], sampling=Sampling(max_new_tokens=5)))
    assert list(base.result().ids) == answer([4], 0, 5)
    for number, stream in zip(range(3, 17), late, strict=True):
        assert list(stream.result().ids) == answer([3], number, 5)
    assert all(len(stream.result().ids) == 100 for stream in busy)


def test_weights_that_left_host_memory_are_read_again(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=1), max_host_adapters=1)
    for number in (1, 2, 3):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    assert {state.residency for state in engine.adapters()} == {"disk", "host"}
    for number in (1, 2, 3, 1):
        completion = engine.submit(Request(prompt_ids=[7], adapter=f"a{number}", sampling=Sampling(max_new_tokens=3))).result()
        assert list(completion.ids) == answer([7], number, 3)


def test_weights_that_changed_on_disk_fail_their_rows_and_no_other(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=1), max_host_adapters=1)
    for number in (1, 2):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    adapter_folder(tmp_path / "a1", 9)
    with pytest.raises(DataError, match="another version"):
        engine.submit(Request(prompt_ids=[7], adapter="a1")).result()
    assert engine.submit(Request(prompt_ids=[7], adapter="a2", sampling=Sampling(max_new_tokens=3))).result().ids


class DamagedRunner(ToyRunner):
    """With an adapter, a text of six tokens has no numbers."""

    wrong = math.nan

    def run(self, pieces: list[Piece]) -> torch.Tensor:
        lengths = [(row.slot, stop) for row, _, stop in pieces if stop == len(row.ids)]
        logits = super().run(pieces)
        for number, (slot, length) in enumerate(lengths):
            if slot >= 0 and length == 6:
                logits[number, 3] = self.wrong
        return logits


@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_row_without_numbers_fails_and_no_other(engine_of, tmp_path: Path, wrong: float, runs_ahead: bool):
    runner = DamagedRunner(runs_ahead=runs_ahead)
    runner.wrong = wrong
    engine = engine_of(runner)
    engine.add_adapter("bad", adapter_folder(tmp_path / "bad", 3))
    for sampling in (Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, temperature=1.0, logprobs=2, min_new_tokens=9)):
        runner.go.clear()
        bad = engine.submit(Request(prompt_ids=[5, 6, 7], adapter="bad", sampling=sampling))
        good = engine.submit(Request(prompt_ids=[5, 6, 7], sampling=Sampling(max_new_tokens=9)))
        runner.go.set()
        with pytest.raises(DataError, match="bad: its results for this prompt are no finite numbers"):
            bad.result()
        assert list(good.result().ids) == answer([5, 6, 7], 0, 9)
    assert engine.submit(Request(prompt_ids=[5, 6, 7], adapter="bad", sampling=Sampling(max_new_tokens=2))).result().ids
    assert engine.stats().running == 0 and engine.stats().cache_used == 0


def test_a_prompt_that_leaves_no_room_is_refused(engine_of):
    engine = engine_of(ToyRunner(), max_length=20)
    with pytest.raises(ConfigError, match="within 20 tokens"):
        engine.submit(Request(prompt_ids=[1] * 20))
    completion = engine.submit(Request(prompt_ids=[1] * 18, sampling=Sampling(max_new_tokens=9))).result()
    assert (len(completion.ids), completion.finish) == (2, "length")


def test_a_token_that_the_model_lacks_is_refused_and_the_engine_goes_on(engine_of):
    engine = engine_of(ToyRunner(), end_ids=[END, V + 5])  # a tokenizer may have more tokens than the model
    for prompt, bias in (([V], ()), ([-1], ()), ([1], ((V, 1.0),))):
        with pytest.raises(ConfigError, match=rf"token ids must be from 0 to {V - 1}"):
            engine.submit(Request(prompt_ids=prompt, sampling=Sampling(logit_bias=bias)))
    for wrong in (lambda: engine.pooled([[1], [V]], "mean"), lambda: engine.answer_logprobs([[1]], [[V]])):
        with pytest.raises(ConfigError, match="token ids"):
            wrong()
    longest = Sampling(max_new_tokens=4, min_new_tokens=4)
    assert len(engine.submit(Request(prompt_ids=[5], sampling=longest)).result().ids) == 4


def test_whoever_waits_is_told_when_the_engine_breaks(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner)
    runner.cache.clear()
    threading.excepthook, before = lambda args: None, threading.excepthook
    try:
        with pytest.raises(ResourceError, match=r"not running\. list assignment index"):
            engine.submit(Request(prompt_ids=[1])).result()
        with pytest.raises(ResourceError, match="not running"):
            engine.submit(Request(prompt_ids=[1]))
    finally:
        threading.excepthook = before


def test_a_row_with_its_last_token_is_told_too_when_the_engine_is_closed_before_its_text_is_made(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner, overlaps=True)
    runner.go.clear()
    stream = engine.submit(Request(prompt_ids=[1], sampling=Sampling(max_new_tokens=1)))
    while not engine.stats().running:
        time.sleep(0.001)
    closing = threading.Thread(target=engine.close)
    closing.start()
    time.sleep(0.1)
    runner.go.set()
    with pytest.raises(ResourceError, match="was closed"):
        stream.take(timeout_s=5)
    closing.join()


def test_a_text_that_waits_for_a_slot_is_told_when_the_engine_is_closed(engine_of, tmp_path: Path):
    runner = ToyRunner(slots=1)
    runner.delay_s = 0.02
    engine = engine_of(runner)
    for number in (1, 2):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    engine.submit(Request(prompt_ids=[1], adapter="a1", sampling=Sampling(max_new_tokens=150)))
    while not engine.stats().running:
        time.sleep(0.001)
    pooled = engine.pooled([[1]], "mean", "a2")
    time.sleep(0.1)
    engine.close()
    with pytest.raises(ResourceError, match="not running"):
        pooled.result(timeout=5)


def busy(engine: NativeEngine, runner: ToyRunner, tokens: int = 190) -> Any:
    """A request whose first step waits for runner.go: until then nothing else happens in the engine's thread."""
    runner.go.clear()
    stream = engine.submit(Request(prompt_ids=[1], sampling=Sampling(max_new_tokens=tokens)))
    while not engine.stats().running:
        time.sleep(0.001)
    return stream


def test_texts_are_computed_in_packs_between_steps_each_request_in_turn(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner, step_tokens=16)
    stream = busy(engine, runner)
    texts = [[1 + number] * 6 for number in range(20)] + [[9] * 30]
    asked = [engine.pooled(texts, "mean"), engine.pooled(texts, "mean"), engine.answer_logprobs(texts, texts)]
    runner.go.set()
    assert asked[0].result(30) == asked[1].result(30) == [[float(sum(text)), -1.0] for text in texts]
    scored = asked[2].result(30)
    assert len(stream.result().ids) == 190
    steps, packs = zip(*runner.passes, strict=True)
    assert scored == runner.answer_logprobs(texts, texts, -1)
    assert all(len(pack) == 1 or sum(map(len, pack)) <= 16 for pack in packs)
    assert packs[0] == packs[1] == texts[:2] and packs[2] == texts[:1]  # answers are counted with their prompts
    assert len(steps) > 40 and all(later > earlier for earlier, later in pairwise(steps))
    assert engine.pooled([], "mean").result(30) == [] == engine.answer_logprobs([], []).result(30)


def test_texts_that_nobody_waits_for_are_not_computed_and_the_engine_goes_on(engine_of, tmp_path: Path):
    runner = ToyRunner(slots=1)
    engine = engine_of(runner)
    engine.add_adapter("mine", adapter_folder(tmp_path / "mine", 3))
    stream = busy(engine, runner, tokens=3)
    given_up = [engine.pooled([[1]], "mean", name) for name in (None, "mine")]
    assert all(future.cancel() for future in given_up)
    runner.go.set()
    assert len(stream.result().ids) == 3
    assert engine.pooled([[2, 3]], "mean", "mine").result(30) == [[5.0, 3.0]]
    assert [pack for _, pack in runner.passes] == [[[2, 3]]]
    assert engine.stats().running == engine.stats().waiting == 0


def test_texts_that_nobody_waits_for_do_not_hinder_the_engine_s_end(engine_of):
    runner = ToyRunner()
    engine = engine_of(runner)
    stream = busy(engine, runner)
    given_up, kept = engine.pooled([[1]], "mean"), engine.pooled([[2]], "mean")
    assert given_up.cancel()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed.is_set():
        time.sleep(0.001)
    runner.go.set()
    closing.join()
    for waiting in (lambda: kept.result(5), lambda: stream.result()):
        with pytest.raises(ResourceError):
            waiting()


def test_one_slot_is_left_to_adapters_that_are_not_pinned(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=2))
    for number in (1, 2, 3):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number), pinned=number == 1)
    adapter_folder(tmp_path / "a3", 4)
    for refused in (
        lambda: engine.pin("a2", True),
        lambda: engine.add_adapter("a4", tmp_path / "a1", pinned=True),
        lambda: engine.add_adapter("a2", tmp_path / "a2", pinned=True),
        lambda: engine.add_adapter("a3", tmp_path / "a3", pinned=True),
    ):
        with pytest.raises(ConfigError, match=r"fewer than the slots for adapters, of which there are 2.*max_adapters"):
            refused()
    assert {one.name: one.pinned for one in engine.adapters()} == {"a1": True, "a2": False, "a3": False}
    for number in (1, 2, 3):
        stream = engine.submit(Request(prompt_ids=[3], adapter=f"a{number}", sampling=Sampling(max_new_tokens=5)))
        assert list(stream.result().ids) == answer([3], number, 5)
    engine.pin("a1", True)
    engine.pin("a1", False)
    engine.pin("a2", True)


def test_a_new_version_keeps_its_name_s_pin(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=2))
    engine.add_adapter("mine", adapter_folder(tmp_path / "a", 1))
    engine.pin("mine", True)
    engine.add_adapter("mine", adapter_folder(tmp_path / "a", 2))
    assert [one.pinned for one in engine.adapters()] == [True]


def test_versions_that_were_replaced_take_no_place_in_host_memory(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(), max_host_adapters=2)
    engine.add_adapter("other", adapter_folder(tmp_path / "b", 9))
    for number in (1, 2, 3):
        engine.add_adapter("mine", adapter_folder(tmp_path / "a", number))
    assert [one.residency for one in engine.adapters()] == ["host", "host"]


def test_an_adapter_that_was_removed_while_it_was_read_takes_no_place_in_host_memory(tmp_path: Path):
    reads, has_read = threading.Event(), threading.Event()

    def read(folder: Path) -> tuple[str, int]:
        assert reads.wait(30)
        return folder.name, 8

    store = AdapterStore(read, max_host=1, num_slots=1, on_read=has_read.set)
    reads.set()
    first, _ = store.add("a", adapter_folder(tmp_path / "a", 1), pinned=False)
    store.add("b", adapter_folder(tmp_path / "b", 2), pinned=False)
    reads.clear()
    assert not store.ready(first)
    store.remove("a")
    reads.set()
    assert has_read.wait(30)
    assert first.weights == "a"  # rows that were waiting for it get it
    assert [one.weights for one in store.all()] == ["b"]
    store.close()


def test_an_adapter_that_could_not_be_read_again_is_there_again_when_it_is_loaded_again(engine_of, tmp_path: Path):
    engine = engine_of(ToyRunner(slots=1), max_host_adapters=1)
    for number in (1, 2):
        engine.add_adapter(f"a{number}", adapter_folder(tmp_path / f"a{number}", number))
    (tmp_path / "a1").rename(tmp_path / "away")
    with pytest.raises(DataError):
        engine.submit(Request(prompt_ids=[7], adapter="a1")).result()
    (tmp_path / "away").rename(tmp_path / "a1")
    engine.add_adapter("a1", tmp_path / "a1")
    completion = engine.submit(Request(prompt_ids=[7], adapter="a1", sampling=Sampling(max_new_tokens=3))).result()
    assert list(completion.ids) == answer([7], 1, 3)


def test_stats_can_be_asked_while_rows_come_and_go(engine_of):
    engine = engine_of(ToyRunner(num_blocks=512), max_rows=2)
    streams = [
        engine.submit(Request(prompt_ids=[1 + number % 90], sampling=Sampling(max_new_tokens=2))) for number in range(1000)
    ]
    seen = set()
    while engine.stats().generated_tokens < 2000:
        seen.update(engine.stats().waiting_by_reason)
    assert seen == {"rows"} and all(stream.result().finish == "length" for stream in streams)
