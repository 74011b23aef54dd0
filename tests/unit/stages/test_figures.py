"""What a stage says that its evaluations report is what they report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm import api
from tests.runs import tiny_run

EXAMPLES = Path(__file__).parents[3] / "examples"
COMMANDS, PAIRS = ("commands.jsonl", "data=commands"), ("pairs.jsonl", "data=command_pairs")
STAGES = {
    "sft": COMMANDS,
    "sft by dft": (*COMMANDS, "stage.loss=dft"),
    "sft by asft": (*COMMANDS, "stage.loss=asft"),
    "pretrain": ("diary.jsonl", "data=diary", "stage=pretrain", "stage.z_loss=1e-4"),
    "dpo": (*PAIRS, "stage=dpo"),
    "dpo mixed": (*PAIRS, "stage=dpo", "stage.loss={sigmoid:0.5,sft:0.5}"),
    "orpo": (*PAIRS, "stage=orpo"),
    "cpo": (*PAIRS, "stage=cpo"),
    "reward": (*PAIRS, "stage=reward"),
    "kto": ("verdicts.jsonl", "data=command_verdicts", "stage=kto"),
}


@pytest.mark.parametrize("name", STAGES)
def test_each_figure_of_an_evaluation_is_one_that_the_stage_names(name: str, cache: str, tmp_path: Path) -> None:
    file, *own = STAGES[name]
    more = ["data.max_samples=40", "train.max_steps=1", "data.eval_fraction=0.2"]
    run = tiny_run(str(EXAMPLES / file), cache, tmp_path, *own, *more)
    api.train(run)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    reported = {figure.removeprefix("eval_") for record in records for figure in record if figure.startswith("eval_")}
    unsaid = {"router_aux_loss", "perplexity", "entropy", "nll", "kl"}  # by some losses and models alone
    assert reported <= set(run.stage.figures) <= reported | unsaid
