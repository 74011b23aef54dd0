from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm.data import store as token_store
from raytune_llm.data.batches import collate, moved
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.labeled import LabeledRow
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.data.kinds.text import TextRow
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples, _blocks
from raytune_llm.data.store import Store, join
from raytune_llm.models.attention.documents import document_mask


@pytest.fixture
def make(tmp_path):
    """A store of rows of any kind."""

    def make(kind, rows, key="key", end_of_row=None):
        with token_store.under_construction(tmp_path, key) as folder:
            shards = [
                token_store.write_shard(folder / token_store.shard_name(number), part, Dropped(), kind=KINDS[kind])
                for number, part in enumerate((rows[:2], rows[2:]))
            ]
            token_store.complete(folder, shards, {"key": key}, tmp_path / key, kind=kind, end_of_row=end_of_row)
        return Store.open(tmp_path / key)

    return make


def ids(*values):
    return np.array(values, np.int32)


def documents(batch):
    flat, edges = batch.ids_BT.flatten().tolist(), batch.cu_seqlens_S.tolist()
    return [flat[start:end] for start, end in pairwise(edges)]


def trained(batch, document):
    return batch.targets_N[batch.per_token["documents"] == document].tolist()


PAIRS = [PairRow(ids(*range(10 * n, 10 * n + n)), ids(100 + n, 101 + n), ids(200 + n)) for n in range(1, 8)]


def test_attention_pairs_are_what_the_mask_of_real_tokens_lets_through():
    """Of two documents, a third that shares three tokens of the second, and padding."""
    whole = [(ids(1, 2, 3, 4, 5), ids(0, 5)), (ids(6, 7, 8, 9), ids(0, 4)), (ids(10, 11), ids(0, 2), 3)]
    batch = collate([whole], length=16, pad_id=0)
    mask = document_mask(batch.cu_seqlens_S, 1, 16, None, batch.prefixes)
    assert batch.attention_pairs == mask[0, 0, :11].sum()


@pytest.mark.parametrize("packing", [True, False])
def test_each_side_of_a_pair_is_a_document_with_the_prompt(make, packing):
    store = make("pairs", PAIRS)
    samples = Samples(store, np.arange(7), max_length=12, packing=packing)
    batch = samples.batch(np.arange(len(samples)), micro_batch_size=len(samples), pad_id=0)
    found = documents(batch)
    for row, (chosen, rejected) in zip(batch.rows, batch.per_answer["documents"].tolist(), strict=True):
        prompt, good, bad = (part.tolist() for part in store.row(row)[:3])
        assert (found[chosen], found[rejected]) == (prompt + good, prompt + bad)
        assert (trained(batch, chosen), trained(batch, rejected)) == (good, bad)
    assert sorted(batch.rows) == list(range(7))


def test_a_step_of_pairs_counts_pairs(make):
    samples = Samples(make("pairs", PAIRS), np.arange(7), max_length=12, packing=False)
    options = {"micro_batch_size": 2, "global_batch_size": 4, "world_size": 1, "seed": 0, "pad_id": 0}
    assert [step.count for step in Loader(samples, rank=0, **options).epoch(0)] == [4, 3]


def test_a_micro_batch_of_padding_has_no_pairs(make):
    samples = Samples(make("pairs", PAIRS), np.arange(7), max_length=12, packing=True)
    batch = samples.batch(np.zeros(0, np.int64), micro_batch_size=1, pad_id=0)
    chosen_and_rejected, of_tokens = batch.per_answer["documents"], batch.per_token["documents"]
    assert (tuple(chosen_and_rejected.shape), len(of_tokens)) == ((0, 2), 0)
    assert chosen_and_rejected.dtype == of_tokens.dtype == torch.int64


@pytest.mark.parametrize("packing", [True, False])
def test_a_labelled_answer_comes_with_anothers_answer_to_its_prompt(make, packing):
    rows = [LabeledRow(ids(10 * n, 10 * n + 1), ids(100 + n), desirable=n % 2 == 0) for n in range(5)]
    store = make("labeled", rows)
    samples = Samples(store, np.array([0, 1, 3, 4]), max_length=4, packing=packing)
    batch = samples.batch(np.arange(len(samples)), micro_batch_size=len(samples), pad_id=0)
    before = {0: 4, 1: 0, 3: 1, 4: 3}
    other = batch.beside["mismatched"]
    assert other.ids_BT.shape == batch.ids_BT.shape
    own, others = documents(batch), documents(other)
    answers, mismatches = (one.per_answer["documents"].squeeze(1).tolist() for one in (batch, other))
    places = zip(batch.rows, answers, mismatches, batch.per_answer["desirable"].tolist(), strict=True)
    for row, answer, mismatched, desirable in places:
        assert own[answer] == [10 * row, 10 * row + 1, 100 + row]
        assert others[mismatched] == [10 * row, 10 * row + 1, 100 + before[row]]
        assert (trained(other, mismatched), desirable) == ([100 + before[row]], row % 2 == 0)
    assert samples.counts.sum() == 4
    assert samples.tokens.sum() == 4 * 2 * 3


def test_moving_a_batch_moves_the_batches_in_it(make):
    store = make("labeled", [LabeledRow(ids(n), ids(100 + n), desirable=True) for n in range(3)])
    batch = Samples(store, np.arange(3), max_length=4, packing=True).batch(np.arange(1), micro_batch_size=1, pad_id=0)
    moved_batch = moved(batch, lambda tensor: tensor + 1)
    assert torch.equal(moved_batch.beside["mismatched"].ids_BT, batch.beside["mismatched"].ids_BT + 1)
    assert torch.equal(moved_batch.per_answer["desirable"], batch.per_answer["desirable"] + 1)
    assert moved_batch.rows == batch.rows


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), size=st.integers(1, 20))
def test_texts_end_to_end_lose_no_token_and_no_tail(lengths, size):
    rows, starts, pieces, offsets = _blocks(np.array(lengths), size)
    passed = [
        (row, token) for row, start, length in zip(rows, starts, pieces, strict=True) for token in range(start, start + length)
    ]
    assert passed == [(row, token) for row, length in enumerate(lengths) for token in range(length)]
    full = np.add.reduceat(pieces, offsets[:-1])
    assert np.all(full[:-1] == size) and 0 < full[-1] <= size


def test_packed_texts_keep_their_documents_apart(make):
    rows = [TextRow(ids(*range(start, start + length))) for start, length in ((10, 5), (20, 2), (30, 4))]
    samples = Samples(make("text", rows), np.arange(3), max_length=4, packing=True)
    batch = samples.batch(np.arange(3), micro_batch_size=3, pad_id=0)
    assert documents(batch)[:5] == [[10, 11, 12, 13], [14], [20, 21], [30], [31, 32, 33]]
    assert len(batch.trained_N) == samples.counts.sum() == 3 + 1 + 2


def test_an_end_that_the_template_does_not_write_is_the_target_after_every_answer():
    batch = collate([[(ids(1, 2, 3, 4, 9), ids(1, 3, 3, 5))]], length=5, pad_id=0, end_of_row=9)
    assert (batch.trained_N.tolist(), batch.targets_N.tolist()) == ([0, 1, 2, 3], [2, 9, 4, 9])


def test_joined_stores_hold_the_rows_of_each_in_turn(make, tmp_path):
    first, second = make("pairs", PAIRS[:3], "a"), make("pairs", PAIRS[3:], "b")
    joined = join(tmp_path, [("x", first), ("y", second), ("x", first)])
    assert [joined.row(row)[0].tolist() for row in range(10)] == [list(row.prompt_ids) for row in (*PAIRS, *PAIRS[:3])]
    assert joined.row_sources.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert joined.lengths.tolist() == [*first.lengths, *second.lengths, *first.lengths]
    assert (joined.sources, joined.kind, len(joined)) == (("x", "y", "x"), KINDS["pairs"], 10)
    joined.verify()
