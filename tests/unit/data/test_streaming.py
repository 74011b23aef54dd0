from __future__ import annotations

import json
import random
import shutil
import threading
import time
from contextlib import closing
from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.data import store as token_store
from raytune_llm.data import streaming
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.conversations import ConversationRow
from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.data.kinds.text import TextRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import FAILED, shard_name, write_outline, write_shard
from raytune_llm.data.streaming import Stream
from raytune_llm.errors import DataError
from raytune_llm.file_hash import sha256_of
from raytune_llm.train.progress import Progress

MAX_LENGTH = 16


def token_row(number, length):
    return ConversationRow(np.full(length, number + 1), np.array([length // 2, length]))


def text_row(number, length):
    return TextRow(np.full(length, number + 1))


def pair_row(number, length):
    return PairRow(*(np.full(part, number + 1) for part in (length // 2, length - length // 2, 2)))


def labeled_row(number, length):
    return LabeledRow(np.full(length // 2, number + 1), np.full(length - length // 2, number + 1), number % 2 == 0)


ROWS = {"conversations": token_row, "text": text_row, "pairs": pair_row, "labeled": labeled_row}


def publish(folder, shards, kind="conversations", order=None):
    """Shards of rows under construction, in any order."""
    making = token_store.partial(folder)
    making.mkdir(parents=True, exist_ok=True)
    write_outline(making, len(shards), kind, None)
    for number in order or range(len(shards)):
        write_shard(making / shard_name(number), shards[number], Dropped(), kind=KINDS[kind])
        if order is not None:
            time.sleep(0.02)


def stream_of(folder, window_rows=7, packing=True):
    return Stream(folder, window_rows=window_rows, samples=partial(Samples, max_length=MAX_LENGTH, packing=packing))


def loader_of(stream, *, global_batch_size=4, rank=0, world_size=1, micro_batch_size=1):
    return Loader(
        stream,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=3,
        pad_id=0,
    )


def seen(steps):
    """What each step's micro-batches hold."""
    return [[(batch.ids_BT.tolist(), batch.targets_N.tolist()) for batch in step.batches] for step in steps]


def rows_in_shards(lengths, sizes, kind="conversations"):
    rows = [ROWS[kind](number, length) for number, length in enumerate(lengths)]
    edges = np.cumsum([0, *sizes])
    return [rows[start:end] for start, end in zip(edges, [*edges[1:-1], len(rows)], strict=False)]


@pytest.fixture
def shards():
    draw = np.random.default_rng(1)
    return rows_in_shards(draw.integers(2, MAX_LENGTH, 50).tolist(), [9, 1, 0, 20, 20])


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("packing", [True, False])
@settings(max_examples=15)
@given(data=st.data())
def test_no_token_is_lost_or_doubled(kind, packing, data, tmp_path_factory):
    lengths = data.draw(st.lists(st.integers(2, MAX_LENGTH - 2), min_size=1, max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    folder = tmp_path_factory.mktemp("stores") / "key"
    publish(folder, rows_in_shards(lengths, sizes, kind), kind)
    stream = stream_of(folder, data.draw(st.integers(1, 12)), packing)
    steps = list(loader_of(stream, global_batch_size=data.draw(st.integers(1, 6))).epoch(0))
    trained = [batch.targets_N for step in steps for batch in step.batches]
    counted = np.bincount(np.concatenate(trained), minlength=len(lengths) + 1)[1:]
    if kind == "conversations":
        assert counted.tolist() == [length - max(length // 2, 1) for length in lengths]
    if kind == "pairs":
        assert counted.tolist() == [length - length // 2 + 2 for length in lengths]
    if kind == "text":  # a cut in the text leaves the token after it without one that predicts it
        ids = np.concatenate([batch.ids_BT.numpy().reshape(-1) for step in steps for batch in step.batches])
        assert np.bincount(ids, minlength=len(lengths) + 1)[1:].tolist() == lengths
    assert [step.fraction for step in steps] == [0.0] * (len(steps) - 1) + [1.0]
    assert [step.cursor for step in steps] == np.cumsum([len(step.sample_ids) for step in steps]).tolist()


def test_the_pace_and_order_in_which_shards_come_do_not_show(shards, tmp_path):
    publish(tmp_path / "there", shards)
    expected = seen(loader_of(stream_of(tmp_path / "there")).epoch(1))
    order = random.Random(5).sample(range(len(shards)), len(shards))
    writer = threading.Thread(target=publish, args=(tmp_path / "growing", shards), kwargs={"order": order})
    writer.start()
    assert seen(loader_of(stream_of(tmp_path / "growing")).epoch(1)) == expected
    writer.join()


def test_training_starts_with_the_first_window(shards, tmp_path):
    publish(tmp_path / "key", shards)
    for number in (3, 4):
        (token_store.partial(tmp_path / "key") / shard_name(number)).unlink()
    steps = loader_of(stream_of(tmp_path / "key"), global_batch_size=1).epoch(0)
    assert next(steps).cursor == 1
    steps.close()


def test_the_store_may_be_completed_on_the_way(shards, make_store, tmp_path):
    rows = list(chain.from_iterable(shards))
    complete = make_store([(row.ids.tolist(), row.spans.tolist()) for row in rows], rows_per_shard=10)
    expected = seen(loader_of(stream_of(complete.folder)).epoch(0))
    partly = tmp_path / "stores" / "other"
    making = token_store.partial(partly)
    shutil.copytree(complete.folder, making)
    (making / "manifest.json").unlink()
    write_outline(making, 5, "conversations", None)
    for path in making.glob("shard-*"):
        token_store.record(path, token_store.shard_at(path, sha256_of(path)))
    (making / shard_name(4)).rename(making / "later")
    steps = loader_of(stream_of(partly)).epoch(0)
    first = next(steps)
    (making / "later").rename(making / shard_name(4))
    shutil.copy(complete.folder / "manifest.json", making)
    making.rename(partly)
    assert seen([first, *steps]) == expected


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 2), (4, 1), (1, 4)])
def test_world_and_micro_batch_size_do_not_change_what_a_step_sees(shards, tmp_path, world_size, micro_batch_size):
    publish(tmp_path / "key", shards)

    def lines(steps_of_ranks):
        for steps in zip(*steps_of_ranks, strict=True):
            yield sorted(line for step in steps for batch in step.batches for line in batch.ids_BT.tolist() if any(line))

    expected = list(lines([loader_of(stream_of(tmp_path / "key")).epoch(0)]))
    shares = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [loader_of(stream_of(tmp_path / "key"), rank=rank, **shares).epoch(0) for rank in range(world_size)]
    assert list(lines(ranks)) == expected


def test_resumed_steps_are_those_of_the_uninterrupted_stream(shards, tmp_path):
    publish(tmp_path / "key", shards)
    steps = list(loader_of(stream_of(tmp_path / "key")).epoch(2))
    for number, step in enumerate(steps):
        rest = loader_of(stream_of(tmp_path / "key")).epoch(2, step.cursor)
        assert seen(rest) == seen(steps[number + 1 :])


@pytest.mark.parametrize("window_rows", [3, 7, 20])
def test_what_a_checkpoint_says_of_a_stream_resumes_it_with_the_same_steps(shards, tmp_path, window_rows):
    publish(tmp_path / "key", shards)

    def steps_from(progress, number):
        """So many steps, and the state after each."""
        loader = loader_of(stream_of(tmp_path / "key", window_rows))
        with closing(loader.steps(progress)) as steps:
            return list(zip(*((step, json.loads(json.dumps(loader.state()))) for step in islice(steps, number)), strict=True))

    steps, states = steps_from(Progress(), 25)
    assert {step.epoch for step in steps} >= {0, 1}, "the second epoch is begun"
    for number, (at, state) in enumerate(zip(steps[:-1], states, strict=False), start=1):
        cursor = 0 if at.ends_epoch else at.cursor
        rest, after = steps_from(Progress(epoch=at.epoch + at.ends_epoch, cursor=cursor, source_state=state), len(steps) - number)
        assert seen(rest) == seen(steps[number:]) and after == states[number:]
        assert [step.sample_ids for step in rest] == [step.sample_ids for step in steps[number:]]


@pytest.mark.parametrize("window_rows", [3, 7, 20])
def test_a_stream_that_begins_later_packs_nothing_of_what_comes_before(shards, tmp_path, window_rows):
    publish(tmp_path / "key", shards)
    stream, packed = stream_of(tmp_path / "key", window_rows), []
    make = stream.samples
    stream.samples = lambda store, rows: packed.append(len(rows)) or make(store, rows)

    def parts_from(begins):
        packed.clear()
        parts = list(stream.ordered(3, 1, 4, threading.Event(), begins))
        return [[part.samples[sample] for sample in part.order] for part in parts], [part.begins for part in parts], len(packed)

    parts, begin, windows = parts_from((0, 0))
    assert len(parts) > 2 and windows == -(-50 // window_rows)
    for number, at in enumerate(begin):
        rest, begin_there, windows_there = parts_from(at)
        assert str(rest) == str(parts[number:]) and begin_there == begin[number:]
        assert windows_there == windows - at[0]


def test_epochs_differ_in_their_order_alone(shards, tmp_path):
    publish(tmp_path / "key", shards)
    first, second = (list(loader_of(stream_of(tmp_path / "key")).epoch(epoch)) for epoch in (0, 1))
    assert seen(first) != seen(second)
    counts = [
        np.bincount(np.concatenate([batch.ids_BT.view(-1) for step in steps for batch in step.batches]))
        for steps in (first, second)
    ]
    assert counts[0][1:].tolist() == counts[1][1:].tolist()


def test_what_goes_wrong_with_the_store_reaches_who_waits_for_it(shards, tmp_path):
    publish(tmp_path / "key", [*shards, []])
    making = token_store.partial(tmp_path / "key")
    (making / shard_name(5)).unlink()
    (making / FAILED).write_text("row 7 is bad")
    with pytest.raises(DataError, match="row 7 is bad"):
        list(loader_of(stream_of(tmp_path / "key")).epoch(0))


def completed(folder, shards):
    publish(folder, shards)
    making = token_store.partial(folder)
    listed = [token_store.finished_shard(making / shard_name(number)) for number in range(len(shards))]
    token_store.complete(making, listed, {}, folder, kind="conversations")


def damage(path):
    """In its rows, so that it can be read."""
    content = path.read_bytes()
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def test_a_damaged_shard_of_a_complete_store_is_refused_where_its_rows_begin(shards, tmp_path):
    completed(tmp_path / "key", shards)
    whole = seen(loader_of(stream_of(tmp_path / "key")).epoch(0))
    damage(tmp_path / "key" / shard_name(4))
    steps = loader_of(stream_of(tmp_path / "key")).epoch(0)
    assert seen(islice(steps, 2)) == whole[:2]
    with pytest.raises(DataError, match=rf"{shard_name(4)}: does not match its hash. Delete the folder"):
        list(steps)


def test_a_damaged_shard_of_a_store_under_construction_is_awaited_until_it_is_made_again(shards, tmp_path):
    publish(tmp_path / "whole", shards)
    publish(tmp_path / "key", shards)
    damaged = token_store.partial(tmp_path / "key") / shard_name(3)
    damage(damaged)
    threading.Timer(0.2, write_shard, (damaged, shards[3], Dropped()), {"kind": KINDS["conversations"]}).start()
    steps, whole = (seen(loader_of(stream_of(tmp_path / name)).epoch(0)) for name in ("key", "whole"))
    assert steps == whole


def test_each_shard_is_compared_with_its_hash_once_and_only_if_its_rows_are_used(shards, tmp_path, monkeypatch):
    completed(tmp_path / "key", shards)
    compared = []
    monkeypatch.setattr(streaming, "sha256_of", lambda path: compared.append(path.name) or sha256_of(path))
    stream = stream_of(tmp_path / "key")
    for epoch in (0, 1):
        list(stream.ordered(0, epoch, 4, threading.Event(), (4, 0)))  # from row 28 on; shard 3 has 10 to 29
    assert compared == [shard_name(3), shard_name(4)]


def test_a_stream_that_nobody_wants_any_more_stops_waiting(tmp_path):
    stopped = threading.Event()
    threading.Timer(0.1, stopped.set).start()
    with pytest.raises(InterruptedError):
        list(stream_of(tmp_path / "key").ordered(0, 0, 1, stopped))
