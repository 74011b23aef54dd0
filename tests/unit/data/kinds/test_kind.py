"""A kind of row of a test's own: what it takes to add one, and media on their way from a row to a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from raytune_llm.data.batches import moved
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import IDS, Column, Document, Ids, Kind, Rows, sizes_of
from raytune_llm.data.loader import Loader
from raytune_llm.data.samples import Samples
from raytune_llm.data.store import map_shard, write_shard


class PictureRow(NamedTuple):
    ids: Ids
    pixels: np.ndarray


class PictureKind(Kind):
    """Captions under pictures of as many pixels as they like."""

    row = PictureRow
    columns: ClassVar = {"ids": IDS, "pixels": Column(np.float32)}

    def render(self, record, renderer, targets):
        raise NotImplementedError

    def make(self, record, rendered, tokens, targets):
        raise NotImplementedError

    def lengths(self, shard):
        return sizes_of(shard["ids"])

    def trained(self, shard):
        return sizes_of(shard["ids"]) - 1

    def counts(self, shard):
        return self.trained(shard).astype(np.int64)

    def documents(self, store, place, *, max_length, share_prompts):
        ids, _ = store.row(place.row)
        return [Document(ids, np.array([0, len(ids)]))]

    def media(self, store, rows) -> Mapping[str, np.ndarray]:
        pictures = [store.row(row).pixels for row in rows.tolist()]
        sizes = np.array([len(pixels) for pixels in pictures], np.int64)
        return {"pixels": np.concatenate([*pictures, np.zeros(0, np.float32)]), "sizes": sizes}

    def prompt_and_answer(self, row):
        return row.ids[:1], row.ids[1:]


@pytest.fixture
def pictures(tmp_path):
    rows = [PictureRow(np.full(2 + n % 3, n + 1), np.arange(n % 4, dtype=np.float32) + 10 * n) for n in range(9)]
    kind = PictureKind()
    shards = [tmp_path / name for name in "ab"]
    for path, part in zip(shards, (rows[:5], rows[5:]), strict=True):
        write_shard(path, part, Dropped(), kind=kind)
    return rows, Rows(kind, None, [map_shard(path) for path in shards])


@pytest.mark.parametrize("packing", [True, False])
def test_media_travel_from_their_rows_to_the_batch_untouched(pictures, packing):
    rows, store = pictures
    samples = Samples(store, np.arange(len(rows)), max_length=8, packing=packing)
    loader = Loader(samples, micro_batch_size=2, global_batch_size=4, rank=0, world_size=1, seed=0, pad_id=0)
    batches = [batch for step in loader.epoch(0) for batch in step.batches]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        found = batch.media["pixels"].split(batch.media["sizes"].tolist())
        assert [pixels.tolist() for pixels in found] == [rows[row].pixels.tolist() for row in batch.rows]


def test_media_move_with_the_batch(pictures):
    rows, store = pictures
    batch = Samples(store, np.arange(len(rows)), max_length=8, packing=False).batch(np.arange(4), micro_batch_size=4, pad_id=0)
    assert torch.equal(moved(batch, lambda tensor: tensor + 1).media["pixels"], batch.media["pixels"] + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_fields_are_its_columns(kind):
    assert tuple(KINDS[kind].columns) == KINDS[kind].row._fields
