from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raytune_llm.train.enrichers.reference_table import ReferenceTable, ReferenceTables, _write, keys_of
from tests.models import tiny_llama
from tests.steps import labeled_rows, make_store, step_of


@pytest.fixture
def step(tmp_path):
    rows = [([1, 2], [3] * (1 + n)) for n in range(7)]
    return step_of(make_store(tmp_path, "labeled", labeled_rows(rows, [True] * 7)), max_length=32, packing=True, micro=1)


def table_of(step, number):
    """Of each row and its partner, with numbers that tell them."""
    keys = np.sort(np.concatenate([keys_of(batch, 7) for batch in step.batches]))
    return ReferenceTable(keys, np.stack([keys // 7, keys % 7 + number], axis=1).astype(np.float32), 7)


def test_each_row_has_the_values_of_itself_and_its_partner(step):
    batches = ReferenceTables({step.store: table_of(step, 0)}).attach(tiny_llama(), step.batches, step)
    for batch in batches:
        assert batch.per_answer["reference"].tolist() == [list(both) for both in zip(batch.rows, batch.partners, strict=True)]


def test_a_step_reads_the_table_of_its_own_store(step):
    tables = ReferenceTables({step.store: table_of(step, 0), "another": table_of(step, 100)})
    elsewhere = replace(step, store="another")
    (batch, *_) = tables.attach(tiny_llama(), elsewhere.batches, elsewhere)
    assert batch.per_answer["reference"][:, 1].tolist() == [100 + partner for partner in batch.partners]


def test_a_table_in_a_shared_cache_can_be_read_by_other_users(tmp_path):
    (tmp_path / "plain").mkdir()
    _write(ReferenceTable(np.arange(2), np.zeros((2, 2), np.float32), 2), tmp_path / "table", {"a": 1})
    assert (tmp_path / "table").stat().st_mode == (tmp_path / "plain").stat().st_mode
