from __future__ import annotations

import threading
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_llm.data.batches import collate
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples, permutation, split, split_sources
from tests import steps

NUM_ROWS = 53


@pytest.fixture
def store(make_store):
    lengths = np.random.default_rng(1).integers(2, 20, NUM_ROWS).tolist()
    return make_store([([row + 1] * length, [length // 2, length]) for row, length in enumerate(lengths)], rows_per_shard=20)


def samples_of(store, packing=True):
    return Samples(store, np.arange(len(store)), max_length=32, packing=packing)


def loader_of(samples, world_size=1, micro_batch_size=2, rank=0, global_batch_size=8, **settings):
    return Loader(
        samples,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=3,
        pad_id=0,
        **settings,
    )


@given(st.integers(0, 200), st.floats(0, 0.99), st.integers(0, 5))
def test_a_split_holds_out_its_share_and_loses_no_row(num_rows, fraction, seed):
    train, held_out = split(num_rows, fraction, seed)
    assert len(held_out) == round(fraction * num_rows)
    assert sorted([*train, *held_out]) == list(range(num_rows))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(0, 5))
def test_what_is_held_out_of_a_source_does_not_depend_on_the_others(sizes, seed):
    names = [f"source {number}" for number in range(len(sizes))]
    store = SimpleNamespace(sources=names, members=[range(size) for size in sizes])
    fractions = dict(zip(names, (0.5, 0.25, 0.0), strict=False))
    trained, held_out = split_sources(store, fractions, seed)
    assert sorted([*trained, *chain.from_iterable(held_out.values())]) == list(range(sum(sizes)))
    for name, first, size in zip(names, np.cumsum([0, *sizes]), sizes, strict=False):
        alone = split(size, fractions[name], seed)[1]
        assert held_out.get(name, np.zeros(0)).tolist() == (first + alone).tolist()


def test_the_order_depends_on_seed_and_epoch_alone():
    assert permutation(100, 1, 2).tolist() == permutation(100, 1, 2).tolist()
    assert permutation(100, 1, 2).tolist() != permutation(100, 1, 3).tolist()
    assert permutation(100, 2, 2).tolist() != permutation(100, 1, 2).tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_every_row_is_in_one_sample(store, packing):
    samples = samples_of(store, packing)
    documents = chain.from_iterable(samples[sample] for sample in range(len(samples)))
    assert sorted(document.ids.tolist() for document in documents) == sorted(
        store.row(row)[0].tolist() for row in range(NUM_ROWS)
    )
    assert samples.tokens.sum() == store.num_tokens
    assert samples.counts.sum() == store.num_trained_tokens


def test_a_batch_is_shifted_and_keeps_documents_apart():
    first = (np.array([10, 11, 12]), np.array([1, 3]))
    second = (np.array([20, 21, 22, 23]), np.array([0, 1, 2, 3]))
    batch = collate([[first, second]], length=9, pad_id=0)
    assert batch.ids_BT.tolist() == [[10, 11, 12, 20, 21, 22, 23, 0, 0]]
    assert batch.targets_N.tolist() == [11, 12, 22]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert batch.trained_N.tolist() == [0, 1, 4]
    assert batch.cu_seqlens_S.tolist() == [0, 3, 7, 9]
    assert batch.max_seqlen == 4


def test_padding_is_cut_into_documents_no_longer_than_the_longest_row():
    batch = collate([[(np.array([1, 2, 3]), np.array([]))], []], length=8, pad_id=9)
    assert batch.cu_seqlens_S.tolist() == [0, 3, 6, 8, 11, 14, 16]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 0, 1, 2, 0, 1]]
    assert batch.max_seqlen == 3


def test_packs_have_one_shape_and_joined_rows_are_padded_to_a_multiple_of_64(store):
    packed = [batch for step in loader_of(samples_of(store)).epoch(0) for batch in step.batches]
    assert {tuple(batch.ids_BT.shape) for batch in packed} == {(2, 32)}
    joined = [batch for step in loader_of(samples_of(store, False), micro_batch_size=8).epoch(0) for batch in step.batches]
    assert {batch.ids_BT.shape[0] for batch in joined} == {1}
    assert {batch.ids_BT.shape[1] % 64 for batch in joined} == {0}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_world_and_micro_batch_size_do_not_change_what_a_step_sees(store, packing, world_size, micro_batch_size):
    samples = samples_of(store, packing)
    reference = list(loader_of(samples).epoch(1))
    ranks = [list(loader_of(samples, world_size, micro_batch_size, rank).epoch(1)) for rank in range(world_size)]
    for number, expected in enumerate(reference):
        steps = [rank[number] for rank in ranks]
        seen = [sample for step in steps for batch in step.batches for sample in batch.sample_ids]
        assert sorted(seen) == sorted(expected.sample_ids)
        assert len({len(step.batches) for step in steps}) == 1
        assert {(step.cursor, step.count, step.tokens, step.sample_ids) for step in steps} == {
            (expected.cursor, expected.count, expected.tokens, expected.sample_ids)
        }
        assert sum(len(batch.trained_N) for step in steps for batch in step.batches) == expected.count


def test_the_tokens_of_an_epoch_are_those_of_the_store(store):
    trained = [batch.targets_N for step in loader_of(samples_of(store)).epoch(0) for batch in step.batches]
    counted = np.bincount(np.concatenate(trained), minlength=NUM_ROWS + 1)[1:]
    assert counted.tolist() == store.trained.tolist()


@settings(max_examples=20)
@given(data=st.data())
def test_an_epoch_goes_on_from_any_cursor(data):
    order = permutation(NUM_ROWS, 3, 0)
    cursor = data.draw(st.integers(0, NUM_ROWS))
    steps = [order[at : at + 8].tolist() for at in range(cursor, NUM_ROWS, 8)]
    assert list(chain.from_iterable(steps)) == order[cursor:].tolist()


def test_resumed_steps_are_those_of_the_uninterrupted_epoch(store):
    loader = loader_of(samples_of(store, packing=False))
    steps = list(loader.epoch(2))
    for number, step in enumerate(steps):
        rest = list(loader.epoch(2, step.cursor))
        assert [one.sample_ids for one in rest] == [one.sample_ids for one in steps[number + 1 :]]


def test_an_epoch_has_the_promised_steps_and_every_sample_once(store):
    samples = samples_of(store)
    loader = loader_of(samples)
    steps = list(loader.epoch(0))
    assert len(steps) == loader.steps_per_epoch
    assert sorted(chain.from_iterable(step.sample_ids for step in steps)) == list(range(len(samples)))


def test_without_shuffling_samples_come_as_they_are(store):
    loader = loader_of(samples_of(store, packing=False), shuffle=False)
    assert list(chain.from_iterable(step.sample_ids for step in loader.epoch(5))) == list(range(NUM_ROWS))


def test_closing_the_iterator_ends_its_thread(store):
    steps = loader_of(samples_of(store)).epoch(0)
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_an_error_in_the_thread_reaches_the_consumer(store):
    samples = samples_of(store)
    (store.folder / "gone").touch()
    loader = loader_of(samples)
    loader.pad_id = "no number"
    with pytest.raises(ValueError, match="no number"):
        next(loader.epoch(0))


@pytest.mark.parametrize("packing", [False, True])
def test_every_labelled_answer_is_mismatched_once_and_never_with_its_own_request(tmp_path, packing):
    rows = [([1] * (1 + row % 3), [2] * (1 + row % 5)) for row in range(17)]
    store = steps.make_store(tmp_path, "labeled", steps.labeled_rows(rows, [True] * len(rows)))
    batches = steps.step_of(store, max_length=16, packing=packing, micro=2).batches
    partner_of = {row: partner for batch in batches for row, partner in zip(batch.rows, batch.partners, strict=True)}
    assert sorted(partner_of) == sorted(partner_of.values()) == list(range(len(rows)))
    assert all(row != partner for row, partner in partner_of.items())
