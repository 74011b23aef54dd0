from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.errors import ConfigError, DataError, ResourceError, UserError
from raytune_llm.evaluate.choice_files import ChoiceQuestion, read_task
from raytune_llm.evaluate.choice_prompts import asked
from raytune_llm.evaluate.choices import letter_ids
from tests.limits import no_file_larger_than

ANSWERS = {"abstract_algebra": "BABBC", "virology": "BCD"}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU's layout in a zip file, C-Eval's as files: two subjects, and one."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "mmlu").mkdir()
    (folder / "ceval" / "val").mkdir(parents=True)
    (folder / "ceval" / "dev").mkdir()
    categories = {"abstract_algebra": "STEM", "virology": "Other"}
    mapping = {key: {"name": key.replace("_", " "), "category": category} for key, category in categories.items()}
    (folder / "mmlu" / "mapping.json").write_text(json.dumps(mapping))
    with ZipFile(folder / "mmlu" / "mmlu.zip", "w") as archive:
        for subject, answers in ANSWERS.items():
            lines = [f'"Is {n}, or not?",one,None,"three, 3",four,{answer}\n' for n, answer in enumerate(answers)]
            archive.writestr(f"data/test/{subject}_test.csv", "".join(lines))
            archive.writestr(f"data/dev/{subject}_dev.csv", "What is it?,a,b,c,d,D\nAnd that?,e,f,g,h,A\n")
    (folder / "ceval" / "mapping.json").write_text(json.dumps({"law": {"name": "法学", "category": "Humanities"}}))
    for split in ("val", "dev"):
        text = "id,question,A,B,C,D,answer,explanation\n0,谁？,甲,乙,丙,丁,B,因为\n"
        (folder / "ceval" / split / f"law_{split}.csv").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says nothing but an exclamation mark, and of the letters it prefers B: its layers add nothing, and its head says so."""
    folder = tmp_path_factory.mktemp("models") / "planted"
    tokenizer: Any = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    planted: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in planted.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        planted.model.embed_tokens.weight.fill_(1.0)
        planted.lm_head.weight.zero_()
        for letter, value in {"!": 9, "B": 3, "A": 2, "C": 1}.items():
            planted.lm_head.weight[tokenizer.encode(letter)[0]] = value / 32
    planted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(model: Path, benchmark: Path, place: Path, *settings: str):
    ours = [f"model.path={model}", f"evaluate.data={benchmark}", f"output_dir={place}", "evaluate.tasks=[mmlu_test]"]
    return api.evaluate(load_config("evaluate", [*ours, "evaluate.precision=fp32", *settings]))


def test_a_question_is_asked_in_the_words_of_the_protocol():
    example = ChoiceQuestion("What is it?", {"A": "a", "B": "b", "C": "c", "D": "d"}, "D")
    question = ChoiceQuestion("And that?", {"A": "e", "B": "f", "C": "g", "D": "h"}, "A")
    conversation = asked(question, [example], "abstract algebra", "en")
    assert [(message.role, message.content) for message in conversation.messages] == [
        (
            "user",
            "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
            "What is it?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        ),
        ("assistant", "D"),
        ("user", "And that?\nA. e\nB. f\nC. g\nD. h\nAnswer:"),
    ]
    (only,) = asked(question, [], "法学", "zh").messages
    assert (
        only.content == "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\nAnd that?\nA. e\nB. f\nC. g\nD. h\n答案："
    )


def test_the_scores_of_planted_logits_are_known_by_hand(model, benchmark, tmp_path):
    done = evaluated(model, benchmark, tmp_path / "out", "evaluate.tasks=[mmlu_test,ceval_validation]")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"] == "llamafactory" and results["shots"] == 5
    mmlu = results["models"]["planted"]["mmlu_test"]
    right = {"STEM": (3, 5), "Other": (1, 3), "Average": (4, 8)}
    for name, (correct, questions) in right.items():
        score = correct / questions
        stderr = math.sqrt(score * (1 - score) / (questions - 1))
        assert mmlu[name] == {
            "score": pytest.approx(score), "stderr": pytest.approx(stderr), "correct": correct, "questions": questions
        }  # fmt: skip
    assert mmlu["STEM/abstract_algebra"]["correct"] == 3
    assert results["models"]["planted"]["ceval_validation"]["Average"]["score"] == 1.0
    letters = json.loads((done.folder / "answers" / "planted" / "mmlu_test.json").read_text())
    assert letters == {"abstract_algebra": {str(n): "B" for n in range(5)}, "virology": {str(n): "B" for n in range(3)}}
    table = (done.folder / "results.md").read_text()
    assert "| planted | 50.00 ± 18.90 | 60.00 ± 24.49 | 33.33 ± 33.33 |" in table and "llamafactory" in table
    assert (done.folder / "results.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of Git LFS, not the file itself"),
        (b"PK\x03\x04 cut off", "can't be read"),
        (None, "can't be read"),
    ],
)
def test_a_damaged_zip_file_is_named(model, benchmark, tmp_path, made, said):
    """None: a byte within a file of it has changed."""
    folder = shutil.copytree(benchmark, tmp_path / "evaluation")
    file = folder / "mmlu" / "mmlu.zip"
    if made is None:
        with ZipFile(file, "r") as archive:
            names = archive.namelist()
        with ZipFile(file, "w", ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, "What is it?,a,b,c,d,D\n" * 200)
        damaged = bytearray(file.read_bytes())
        damaged[80:100] = b"\xff" * 20
        made = bytes(damaged)
    file.write_bytes(made)
    with pytest.raises(DataError, match=rf"mmlu\.zip: {said}"):
        evaluated(model, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_evaluation_is_kept_and_one_of_other_files_is_refused(model, benchmark, tmp_path):
    folder, place = shutil.copytree(model, tmp_path / "planted"), tmp_path / "out"
    done = evaluated(folder, benchmark, place)
    written = (place / "results.json").stat().st_mtime_ns
    again = evaluated(folder, benchmark, place, "engine.max_rows=2")
    assert again.found and not done.found and (place / "results.json").stat().st_mtime_ns == written
    values = [{name: one.value for name, one in found.scores["planted"]["mmlu_test"].items()} for found in (done, again)]
    assert values[0] == values[1]
    with pytest.raises(ConfigError, match=r"output_dir must hold no results .* this one differs in evaluate\.shots, got"):
        evaluated(folder, benchmark, place, "evaluate.shots=0")
    changed: Any = AutoModelForCausalLM.from_pretrained(folder)
    changed.lm_head.weight.data.neg_()
    changed.save_pretrained(folder)
    with pytest.raises(ConfigError, match="this one differs in the models, got"):
        evaluated(folder, benchmark, place)


@pytest.mark.parametrize("how", ["Ctrl-C", "a full disk"])
def test_an_evaluation_that_ended_early_has_no_results_and_is_asked_again(model, benchmark, tmp_path, how):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    if how == "Ctrl-C":
        words = [
            f"model.path={model}",
            f"evaluate.data={benchmark}",
            f"output_dir={tmp_path / 'out'}",
            "evaluate.tasks=[mmlu_test]",
        ]
        with pytest.raises(KeyboardInterrupt):
            api.evaluate(load_config("evaluate", [*words, "evaluate.precision=fp32"]), on_progress=stop)
    else:
        full = pytest.raises(
            ResourceError, match=r"Free some space, or set output_dir on a larger disk; the same command resumes after"
        )
        with no_file_larger_than(3_000), full:
            evaluated(model, benchmark, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    done = evaluated(model, benchmark, tmp_path / "out")
    assert not done.found and done.scores["planted"]["mmlu_test"]["Average"].value == 0.5


def test_models_that_were_asked_before_an_interrupt_are_not_asked_again(model, benchmark, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    words = [f"evaluate.data={benchmark}", "evaluate.tasks=[mmlu_test]", "evaluate.precision=fp32"]
    run = load_config("evaluate", [f"evaluate.models=[{model}, {other}]", f"output_dir={tmp_path / 'out'}", *words])
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        if done > 8:  # questions of a model
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.evaluate(run, on_progress=stop)
    done = api.evaluate(run, on_progress=lambda done, total: seen.append(done))
    assert seen == [8, 16]
    files = {name: (done.folder / name).read_text() for name in ("results.json", "results.md")}
    whole = api.evaluate(replace(run, output_dir=str(tmp_path / "whole"))).folder
    assert files == {name: (whole / name).read_text() for name in files}


def test_the_settings_of_a_training_run_are_not_replaced(model, benchmark, tmp_path):
    run = tmp_path / "out"
    run.mkdir()
    (run / "run.yaml").write_text("name: mine\nstage: {name: sft}\n")
    with pytest.raises(ConfigError, match=r"output_dir must not be the output folder of a run.*out/evaluation"):
        evaluated(model, benchmark, run)
    assert (run / "run.yaml").read_text().startswith("name: mine") and len(list(run.iterdir())) == 1


def test_a_model_that_has_changed_since_an_interrupt_is_asked_again(model, benchmark, tmp_path):
    folder = shutil.copytree(model, tmp_path / "planted")
    evaluated(folder, benchmark, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    changed: Any = AutoModelForCausalLM.from_pretrained(folder)
    changed.lm_head.weight.data.neg_()
    changed.save_pretrained(folder)
    assert evaluated(folder, benchmark, tmp_path / "out").scores["planted"]["mmlu_test"]["Average"].value != 0.5


@pytest.mark.parametrize("name", ["results.md", "results.png"])
def test_results_whose_table_or_picture_is_gone_are_made_again(model, benchmark, tmp_path, name):
    folder = evaluated(model, benchmark, tmp_path / "out").folder
    (folder / name).unlink()
    assert not evaluated(model, benchmark, tmp_path / "out").found
    assert (folder / name).is_file()


def test_a_chain_that_is_repeated_keeps_its_export_and_its_evaluation_and_asks_the_rest(model, benchmark, tmp_path):
    """The model that is evaluated is there only when the first step has run."""
    made, later = tmp_path / "made", tmp_path / "later"
    asked = f"model.path={made}, 'evaluate.tasks=[mmlu_test]', evaluate.precision=fp32"
    steps = [
        f"export: [export, model.path={model}, export.output_dir={made}, export.check=false]",
        f"first: [evaluate, {asked}, evaluate.data={benchmark}, output_dir={tmp_path / 'first'}]",
        f"second: [evaluate, {asked}, evaluate.data={later}, output_dir={tmp_path / 'second'}]",
    ]
    run = load_config("chain", [f"steps={{{', '.join(steps)}}}"])
    with pytest.raises(ConfigError, match="evaluate.data must hold mmlu/mapping.json".replace(".", r"\.")):
        api.chain(run)
    shutil.copytree(benchmark, later)
    done = api.chain(run)
    assert [one.found for one in done.values()] == [True, True, False]
    assert done["second"].scores["made"]["mmlu_test"]["Average"].value == 0.5


def test_texts_are_read_as_they_are_written(benchmark):
    subject = read_task("mmlu_test", benchmark)[0]
    assert subject.questions[1].question == "Is 1, or not?"
    assert subject.questions[1].choices == {"A": "one", "B": "None", "C": "three, 3", "D": "four"}


def test_letters_are_the_last_tokens_of_their_encodings():
    tokenizer = byte_tokenizer()
    assert letter_ids(tokenizer) == {ord(letter): letter for letter in "ABCD"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluate.tasks=[mmlu_train]"], "evaluate.tasks must hold names of mmlu_test"),
        (["evaluate.tasks=[cmmlu_validation]"], "evaluate.tasks must hold names of"),
        (["evaluate.tasks=[mmlu,mmlu_test]"], "evaluate.tasks must hold each task once: mmlu_test"),
        (["evaluate.tasks=[cmmlu_test]"], "cmmlu/mapping.json"),
        (["evaluate.tasks=[mmlu_validation]"], "abstract_algebra_val.csv"),
        (["evaluate.tasks=[]"], "evaluate.tasks must name a task"),
        (["evaluate.fewshot_as_multiturn=false"], "evaluate.fewshot_as_multiturn is of evaluate.protocol=lm_eval"),
        (["evaluate.models=[/nothing/there]", "model.path=null"], "evaluate.models"),
        (["output_dir=null"], "output_dir must be given"),
        (["output_dir=/dev/null/x"], "output_dir"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(model, benchmark, tmp_path, settings, said):
    with pytest.raises(UserError) as raised:
        evaluated(model, benchmark, tmp_path / "out", *settings)
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_question_that_is_too_long_is_named(model, benchmark, tmp_path):
    with pytest.raises(DataError, match="mmlu_test, abstract_algebra, question 1: with 5 examples it is longer than 128 tokens"):
        evaluated(model, benchmark, tmp_path / "out", "evaluate.max_length=128")
