"""Who starts when slots are rare, by a clock that the test sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytune_llm.engines.native.blocks import BlockPool
from raytune_llm.engines.native.passes import Passes
from raytune_llm.engines.native.row import Row
from raytune_llm.engines.native.scheduler import PATIENCE_S, Scheduler
from raytune_llm.engines.native.slots import Adapter, Slots
from raytune_llm.engines.requests import Sampling, Stream
from tests.toy_engine import ToyBank


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scheduler(clock: Clock, slots: int) -> Scheduler:
    return Scheduler(BlockPool(64, 4), Slots(ToyBank(slots)), max_rows=8, step_tokens=64, now=clock)


def adapter(name: str, weights: int | None = 1) -> Adapter:
    return Adapter(name=name, version=name, rank=8, folder=Path(name), weights=weights)


def row(clock: Clock, of: Adapter) -> Row:
    parts: Any = {"sampler": None, "text": None}
    return Row(stream=Stream(), sampling=Sampling(), ids=[1, 2], prompt_tokens=2, limit=9, adapter=of, arrived=clock.now, **parts)


def passes(clock: Clock, of: Adapter) -> Passes:
    return Passes(iter([lambda slot: [slot]] * 3), of, arrived=clock.now)


def added(schedule: Scheduler, clock: Clock, of: Adapter) -> Row:
    clock.now += 0.001
    schedule.add(one := row(clock, of))
    schedule.schedule()
    return one


def test_weights_that_are_being_read_hold_back_nobody(clock: Clock):
    schedule, on_disk, resident = scheduler(clock, slots=2), adapter("a", None), adapter("b")
    first, waiting = added(schedule, clock, resident), added(schedule, clock, on_disk)
    clock.now += 10 * PATIENCE_S
    younger = added(schedule, clock, resident)
    assert schedule.running == [first, younger] and schedule.waiting_by_reason() == {"weights": 1}
    on_disk.weights = 1
    schedule.schedule()
    assert waiting in schedule.running


def test_rows_of_a_pinned_adapter_pass_one_that_waits_for_a_slot(clock: Clock):
    schedule, pinned, other = scheduler(clock, slots=2), adapter("a"), adapter("b")
    pinned.pinned = True
    first, second = added(schedule, clock, pinned), added(schedule, clock, other)
    waiting = added(schedule, clock, adapter("c"))
    clock.now += 10 * PATIENCE_S
    younger, held_back = added(schedule, clock, pinned), added(schedule, clock, other)
    assert schedule.running == [first, second, younger]
    schedule.end(second)
    schedule.schedule()
    assert waiting in schedule.running and held_back in schedule.waiting


def test_passes_wait_for_a_slot_as_rows_do_and_have_their_turn(clock: Clock):
    schedule, busy = scheduler(clock, slots=1), adapter("a")
    running = added(schedule, clock, busy)
    schedule.passes.append(waiting := passes(clock, adapter("b")))
    assert schedule.next_passes() is None and schedule.waiting_by_reason() == {"adapter": 1}
    clock.now += 10 * PATIENCE_S
    younger = added(schedule, clock, busy)
    assert younger in schedule.waiting
    schedule.end(running)
    assert schedule.next_passes() is waiting and waiting.slot == 0
    schedule.give_back_slot(waiting)


def test_rows_have_their_turn_between_the_passes_of_a_long_request(clock: Clock):
    schedule, mine, others = scheduler(clock, slots=1), adapter("a"), adapter("b")
    schedule.passes.append(long := passes(clock, mine))
    assert schedule.next_passes() is long
    schedule.give_back_slot(long)
    between = added(schedule, clock, others)
    assert between in schedule.running and schedule.next_passes() is None
    schedule.end(between)
    assert schedule.next_passes() is long
