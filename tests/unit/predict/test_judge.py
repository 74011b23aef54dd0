"""A reward model of a run judges the answers."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.predict.judge import _numbers
from raytune_llm.predict.rows import PromptRows
from tests.runs import tiny_run

PAIRS = [
    {
        "conversations": [{"from": "human", "value": f"Say {word}."}],
        "chosen": {"from": "gpt", "value": word},
        "rejected": {"from": "gpt", "value": "no"},
    }
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
]


@pytest.fixture(scope="module", params=["none", "lora"])
def judge(request, cache, tmp_path_factory) -> Path:
    """A run that trains a reward model."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    settings = ["stage=reward", "data=sharegpt_pairs", f"adapter={request.param}", "train.max_steps=2", "data.eval_fraction=0"]
    api.train(tiny_run(str(folder / "pairs.json"), cache, folder / request.param, *settings))
    return folder / request.param


def test_it_is_not_asked_for_answers_itself(prediction, judge, tmp_path):
    with pytest.raises(ConfigError, match=r"predict\.run must write texts: it is a reward model's"):
        api.predict(prediction(f"predict.run={judge}", "model.path=null"))
    assert not (tmp_path / "out").exists()
    words = [f"evaluate.models=[{judge}]", "evaluate.tasks=[mmlu_test]", "evaluate.data=there", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"evaluate\.models must write texts: it is a reward model's"):
        api.evaluate(load_config("evaluate", words))


def test_its_scores_of_answers_and_given_answers_are_those_of_transformers(prediction, judge):
    run = prediction(f"predict.judge={judge}")
    done = api.predict(run)
    rewards = [json.loads(line) for line in (done.folder / "rewards.jsonl").read_text().splitlines()]
    assert [one["row"] for one in rewards] == list(range(1, 13))
    numbers = done.metrics["base"]
    assert numbers["reward"] == pytest.approx(fmean(one["reward"] for one in rewards))
    assert numbers["label_reward"] == pytest.approx(fmean(one["label_reward"] for one in rewards))
    wins = [(one["reward"] > one["label_reward"]) + (one["reward"] == one["label_reward"]) / 2 for one in rewards]
    assert numbers["reward_win_rate"] == pytest.approx(fmean(wins))
    if (judge / "final" / "adapter_config.json").exists():
        return
    model = AutoModelForSequenceClassification.from_pretrained(judge / "final", dtype=torch.float32, num_labels=1)
    rows = PromptRows(run.model, run.data)  # the same tokenizer as the judge's
    said = [json.loads(line)["predict"] for line in (done.folder / "predictions.jsonl").read_text().splitlines()]
    for answers, key in ((None, "label_reward"), (iter(said), "reward")):
        for ids, one in zip(rows.with_answers(answers), rewards, strict=True):
            assert ids is not None
            with torch.no_grad():
                score = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
            assert one[key] == pytest.approx(score, abs=1e-4)


def test_a_row_with_its_own_answer_reads_as_the_data_have_it(prediction):
    run = prediction()
    rows = PromptRows(run.model, run.data)
    given = [(*row.prompt_ids, *row.answer_ids) for row in rows]
    assert list(rows.with_answers(None)) == given
    texts = [rows.tokenizer.decode(list(row.answer_ids), skip_special_tokens=True) for row in rows]
    assert list(rows.with_answers(iter(texts))) == given


def test_what_is_no_reward_model_is_refused_before_anything_is_written(prediction, cache, chat_rows, tmp_path):
    api.train(tiny_run(chat_rows, cache, tmp_path / "sft", "train.max_steps=1", "data.eval_fraction=0"))
    with pytest.raises(ConfigError, match=r"predict\.judge must be the output folder of a reward model's run"):
        api.predict(prediction(f"predict.judge={tmp_path / 'sft'}"))
    assert not (tmp_path / "out").exists()


def test_without_a_scored_answer_there_is_no_mean():
    assert _numbers([None, None], [None, 2.0]) == {"label_reward": 2.0}
