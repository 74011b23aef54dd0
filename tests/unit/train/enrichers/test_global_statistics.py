"""Numbers of the whole global batch, and what is remembered of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from raytune_llm.stages import GlobalStatistics
from raytune_llm.train.enrichers.global_statistics import FirstPass
from tests.steps import labeled_rows, make_store, step_of


@pytest.fixture
def step(tmp_path):
    rows = [([1, 2], [3] * (1 + n)) for n in range(7)]
    return step_of(
        make_store(tmp_path, "labeled", labeled_rows(rows, [n % 2 == 0 for n in range(7)])), max_length=32, packing=False, micro=2
    )


def counted(values_A1, state):
    """Every row is told the sum of all and how many steps there were before."""
    return {"total": values_A1.sum(0).expand(len(values_A1)), "before": state.expand(len(values_A1))}, state + 1


STATISTICS = GlobalStatistics(
    values=lambda model, batch: torch.tensor([[float(row)] for row in batch.rows]).reshape(-1, 1), reduce=counted, state=(0.0,)
)


def test_every_row_is_told_of_all_rows_of_the_step(step):
    batches = FirstPass(STATISTICS).attach(torch.nn.Identity(), step.batches, step)
    assert len(batches) > 1
    for batch in batches:
        assert batch.per_answer["total"].tolist() == [sum(range(7))] * len(batch.rows)


def test_what_is_remembered_goes_from_step_to_step_and_through_a_checkpoint(step):
    first = FirstPass(STATISTICS)
    first.attach(torch.nn.Identity(), step.batches, step)
    first.attach(torch.nn.Identity(), step.batches, replace(step, held_out=True))
    assert first.state() == [1.0]
    second = FirstPass(STATISTICS)
    second.load(first.state())
    (batch, *_) = second.attach(torch.nn.Identity(), step.batches, step)
    assert batch.per_answer["before"].tolist() == [1.0] * len(batch.rows)


def test_values_stand_in_the_order_of_the_step_whatever_the_micro_batches(step):
    seen = []
    statistics = replace(STATISTICS, reduce=lambda values, state: (seen.append(values[:, 0].tolist()) or {}, state))
    FirstPass(statistics).attach(torch.nn.Identity(), step.batches, step)
    assert seen == [np.arange(7.0).tolist()]
