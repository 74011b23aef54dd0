"""train.eval_tasks: tasks of lm-evaluation-harness, answered by the policy at each evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm import ConfigError, api
from raytune_llm.config.adapter import NoAdapter
from raytune_llm.config.load import load_config
from raytune_llm.data.pipeline import prepare
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.engines.batch import BatchEngine
from raytune_llm.engines.questions import Question
from raytune_llm.models.build import build_policy
from raytune_llm.models.load import load_config as load_model_config
from raytune_llm.runs.task_scores import PolicyAnswering
from tests.group import metrics
from tests.models import model_section
from tests.runs import tiny_run

pytest.importorskip("lm_eval")

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/letters.json}}}}
output_type: {output_type}
test_split: test
doc_to_text: "Say {{{{letter}}}}:"
doc_to_target: letter
{beside}
"""
ASKED = {
    "multiple_choice": "doc_to_choice: [a, b, c d]\nmetric_list: [{metric: acc}]",
    "generate_until": "generation_kwargs: {until: ['.'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]",
}


@pytest.fixture
def task(tmp_path):
    """A file of the task, asked in this way."""

    def of(output_type: str) -> str:
        rows = [{"letter": letter} for letter in "abab"]
        (tmp_path / "letters.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = tmp_path / f"{output_type}.yaml"
        file.write_text(TASK.format(folder=tmp_path, output_type=output_type, beside=ASKED[output_type]))
        return str(file)

    return of


def trained(rows, cache, output, file: str, *overrides: str):
    settings = ["train.max_steps=4", "train.eval_every_steps=2", "data.eval_fraction=0.2", f"train.eval_tasks=[{file}]"]
    return api.train(tiny_run(rows, cache, output, *settings, *overrides))


@pytest.mark.parametrize("output_type", list(ASKED))
def test_scores_are_figures_of_each_evaluation_and_those_of_the_saved_model(task, chat_rows, cache, tmp_path, output_type):
    file = task(output_type)
    trained(chat_rows, cache, tmp_path / "run", file, "adapter=none", "train.eval_on_start=true")
    name = {"multiple_choice": "acc", "generate_until": "exact_match"}[output_type]
    evaluations = [record for record in metrics(tmp_path / "run") if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 2, 4]
    assert all(0 <= record[f"eval_letters_{name}"] <= 1 for record in evaluations)
    settings = [f"model.path={tmp_path}/run/final", f"evaluate.tasks=[{file}]", "evaluate.protocol=lm_eval"]
    done = api.evaluate(load_config("evaluate", [*settings, "evaluate.precision=fp32", f"output_dir={tmp_path}/scores"]))
    assert done.scores["final"]["letters"][name].value == evaluations[-1][f"eval_letters_{name}"]


def test_tasks_change_nothing_of_the_training(task, chat_rows, cache, tmp_path):
    trained(chat_rows, cache, tmp_path / "asked", task("generate_until"), "adapter.dropout=0.1")
    trained(chat_rows, cache, tmp_path / "silent", task("generate_until"), "adapter.dropout=0.1", "train.eval_tasks=[]")
    asked, silent = ([record.get("loss") for record in metrics(tmp_path / name)] for name in ("asked", "silent"))
    assert asked == silent


def test_a_run_stops_early_by_a_score(task, chat_rows, cache, tmp_path):
    stop = ["train.early_stopping=1", "train.early_stopping_metric=eval_letters_acc", "train.early_stopping_mode=max"]
    trained(chat_rows, cache, tmp_path / "run", task("multiple_choice"), *stop, "optimizer.lr=1e-12", "train.max_steps=40")
    assert metrics(tmp_path / "run")[-1]["step"] == 4  # the same weights get the same score again


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.eval_tasks=[./none.yaml]"], "train.eval_tasks must name files and folders"),
        (["data.eval_fraction=0"], "train.eval_tasks needs held-out rows"),
        (["train.eval_tasks=[]", "train.eval_task_questions=3"], "train.eval_task_questions is for train.eval_tasks"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_prepared(task, chat_rows, cache, tmp_path, settings, said):
    with pytest.raises(ConfigError) as raised:
        trained(chat_rows, cache, tmp_path / "run", task("multiple_choice"), "train.eval_every_steps=null", *settings)
    assert said in str(raised.value)


@pytest.mark.long
def test_two_workers_with_a_sharded_policy_get_the_scores_of_one(task, chat_rows, cache, tmp_path, two_workers):
    file = task("multiple_choice")
    asked = ["train.max_steps=2", "train.eval_every_steps=2", "data.eval_fraction=0.2", f"train.eval_tasks=[{file}]"]
    trained(chat_rows, cache, tmp_path / "one", file, *asked)
    spread = ["resources=local", "resources.num_workers=2", "strategy=fsdp"]
    run = tiny_run(chat_rows, cache, tmp_path / "two", *asked, *spread)
    store = prepare(run.model, run.data, run.resources, kind=run.stage.kind).store
    two_workers.run(run, str(store.folder))
    one, two = ([record for record in metrics(tmp_path / name) if "eval_loss" in record] for name in ("one", "two"))
    assert [record["eval_letters_acc"] for record in one] == [record["eval_letters_acc"] for record in two]
    assert len(one) == 1


@pytest.fixture
def policy(tmp_path):
    config = AutoConfig.for_model("llama", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    path = str(tmp_path / "base")
    section = model_section(
        path=path, revision=None, weights="pretrained", config={}, tokenizer="bytes", trust_remote_code=False, attention="auto"
    )
    none = NoAdapter(name="none")
    policy, _ = build_policy(
        load_model_config(path, {}), section, none, compute=torch.float32, seed=0, device=torch.device("cpu")
    )
    return policy.eval()


def test_what_questions_begin_with_alike_is_computed_once(policy, monkeypatch):
    tokens: list[int] = []
    hidden = type(policy).hidden
    monkeypatch.setattr(
        type(policy), "hidden", lambda self, rows, *rest: tokens.append(rows.ids_BT.numel()) or hidden(self, rows, *rest)
    )
    shots = [65 + number % 20 for number in range(100)]
    found = {}
    for shares in (False, True):
        questions = [Question((*shots, 97 + n), (98 + n, 99), None, None, shares_prefix=shares) for n in range(6)]
        answering = PolicyAnswering(BatchEngine(policy, byte_tokenizer(), device=torch.device("cpu")), 2048)
        [answers] = answering([questions])
        found[shares] = [one.logprobs for one in answers], sum(tokens)
        tokens.clear()
    for apart, shared in zip(found[False][0], found[True][0], strict=True):
        assert shared == pytest.approx(apart, abs=1e-5)
    assert found[False][1] >= 6 * 100 and found[True][1] < 2 * 100
