"""What a run has before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import ConfigError
from raytune_llm.runs.setup import Setup, set_up, steps_at
from raytune_llm.train.enrichers.global_statistics import FirstPass
from raytune_llm.train.enrichers.online_reference import OnlineReference
from raytune_llm.train.enrichers.reference_table import ReferenceTables
from tests.runs import tiny_run

PAIRS = '{"prompt": "one two", "chosen": "three", "rejected": "four five"}\n{"prompt": "six", "chosen": "7", "rejected": "8"}\n'


@pytest.fixture
def made(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS * 6)

    def made(*overrides: str) -> Setup:
        settings = ("data=prompt_completion_pairs", *overrides)
        run = tiny_run(str(path), str(tmp_path / "cache"), tmp_path / "out", *settings)
        store = prepare(run.model, run.data, run.resources, kind=run.stage.kind).store
        return set_up(run, str(store.folder), None, torch.device("cpu"), lambda news: None)

    return made


@pytest.mark.parametrize(
    ("overrides", "enrichers"),
    [
        (["stage=orpo"], []),
        (["stage=cpo", "stage.sft_weight=1.0"], [FirstPass]),
        (["stage=dpo"], [ReferenceTables]),
        (["stage=dpo", "stage.loss=bco_pair", "stage.reference=online"], [OnlineReference, FirstPass]),
    ],
)
def test_a_batch_is_enriched_by_what_its_loss_reads_the_reference_first(made, overrides, enrichers):
    setup = made(*overrides)
    assert [type(enricher) for enricher in setup.enrichers] == enrichers
    assert setup.learner().enrichers is setup.enrichers


def test_the_loop_has_the_steps_of_the_data_and_sources_of_what_is_held_out(made):
    setup = made("stage=orpo", "data.packing=false", "data.eval_fraction=0.25", "train.epochs=3")
    assert setup.loop_settings().total_steps == 3 * setup.source.steps_per_epoch == 6
    (held_out,) = setup.held_out.values()
    assert sum(len(batch.rows) for step in held_out.epoch(0) for batch in step.batches) == 3


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 1), (1.5, 3), (1.1, 3), (2, 4)])
def test_a_part_of_an_epoch_is_trained(made, epochs, steps):
    setup = made("stage=orpo", "data.packing=false", "data.eval_fraction=0.25", f"train.epochs={epochs}")
    assert setup.source.steps_per_epoch == 2
    assert setup.loop_settings().total_steps == steps


@pytest.mark.parametrize(("part", "steps", "at"), [(0.1 * 3, 60, 18), (1 / 3, 9, 3), (0.1, 13, 2), (0.001, 10, 1)])
def test_a_part_of_the_steps_is_made_at_the_first_step_that_reaches_it(part, steps, at):
    assert steps_at(part, steps) == at


def test_so_many_rows_are_held_out_as_eval_rows_says(made):
    setup = made("stage=orpo", "data.packing=false", "data.eval_fraction=0", "data.eval_rows=5")
    (held_out,) = setup.held_out.values()
    assert sum(len(batch.rows) for step in held_out.epoch(0) for batch in step.batches) == 5
    with pytest.raises(ConfigError, match=r"data\.eval_rows must leave rows to train on, of which there are 12, got 12"):
        made("stage=orpo", "data.packing=false", "data.eval_fraction=0", "data.eval_rows=12")


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [(["train.max_steps=1"], False), (["train.max_steps=1", "schedule.warmup_ratio=0"], True), (["train.max_steps=2"], True)],
)
def test_a_run_whose_only_step_is_the_warm_up_says_that_nothing_is_learned(made, overrides, learns):
    setup = made("stage=orpo", "data.packing=false", *overrides)
    assert any("nothing is learned" in choice for choice in setup.choices) != learns
