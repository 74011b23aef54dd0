from __future__ import annotations

import pytest

from raytune_llm import api
from tests.group import metrics
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def runs(chat_rows, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = ("train.max_steps=3", "train.eval_every_steps=2", "checkpoint.final=best", "train.sample_rows=1")
    run = {on: tiny_run(chat_rows, cache, folder / on, *settings, f"train.eval_on_start={on}") for on in ("true", "false")}
    for each in run.values():
        api.train(each)
    return {on: metrics(each.output_dir) for on, each in run.items()}


def losses(records, name):
    return {record["step"]: record[name] for record in records if name in record}


def test_what_training_starts_from_is_evaluated_when_asked_for(runs):
    assert list(losses(runs["true"], "eval_loss")) == [0, 2, 3]
    assert list(losses(runs["false"], "eval_loss")) == [2, 3]


def test_the_first_evaluation_is_of_the_model_that_nothing_was_learned_by(runs):
    before, *after = losses(runs["true"], "eval_loss").values()
    assert before > max(after)


def test_training_goes_on_as_if_nobody_had_looked(runs):
    assert losses(runs["true"], "loss") == losses(runs["false"], "loss")
    assert {step: loss for step, loss in losses(runs["true"], "eval_loss").items() if step} == losses(runs["false"], "eval_loss")
