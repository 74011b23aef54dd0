from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llm import api
from raytune_llm.errors import ConfigError, DataError, ResourceError, UserError
from raytune_llm.predict.predictions import columns_of, line
from raytune_llm.predict.run import _measured
from tests.limits import no_file_larger_than


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def as_transformers_do(model, adapter: str | None, messages: list[dict]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = loaded.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_each_row_is_answered_once_in_order_by_each_model_as_transformers_and_peft_would(prediction, model, adapters, chat_rows):
    given = ",".join(f"{name}: {folder}" for name, folder in adapters.items())
    done = api.predict(prediction("predict.base=true", f"predict.adapters={{{given}}}"))
    found = lines(done.folder)
    assert [(one["row"], one["model"]) for one in found] == [(n, m) for n in range(1, 13) for m in ("base", "one", "two")]
    rows = [json.loads(line) for line in Path(chat_rows).read_text().splitlines()]
    for one in found[:9]:
        messages = rows[one["row"] - 1]["messages"]
        assert one["messages"] == messages
        assert one["label"] == messages[-1]["content"]
        assert one["predict"] == as_transformers_do(model, adapters.get(one["model"]), messages[:-1])
    assert json.loads((done.folder / "metrics.json").read_text()).keys() == {"base", "one", "two"}


def test_what_a_killed_run_left_is_kept_and_the_rest_is_as_if_nothing_had_happened(prediction):
    whole = api.predict(prediction())
    text = (whole.folder / "predictions.jsonl").read_bytes()
    cut = text.index(b"\n", len(text) // 2) + 20  # in the middle of a line
    (whole.folder / "predictions.jsonl").write_bytes(text[:cut])
    again = api.predict(prediction())
    assert 0 < again.found < 12
    assert (whole.folder / "predictions.jsonl").read_bytes() == text
    assert api.predict(prediction()).generated_tokens == 0


def many_rows(folder: Path) -> Path:
    """Three blocks of questions."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": f"say {n}"}], "n": n}) + "\n" for n in range(40))
    )
    return rows


@pytest.mark.parametrize("how", ["Ctrl-C", "a full disk"])
def test_what_was_answered_before_an_end_is_kept_and_the_rest_is_as_if_nothing_had_happened(prediction, tmp_path, how):
    words = [f"data.path={many_rows(tmp_path)}", "data.max_samples=null", "predict.max_new_tokens=2"]
    whole = (api.predict(prediction(*words, f"output_dir={tmp_path / 'whole'}")).folder / "predictions.jsonl").read_bytes()

    def stop(done: int, total: int) -> None:
        if done == 32:
            raise KeyboardInterrupt

    if how == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            api.predict(prediction(*words), on_progress=stop)
    else:
        full = pytest.raises(ResourceError, match="what is answered is kept, and the same command answers the rest")
        with no_file_larger_than(len(whole) * 3 // 4), full:
            api.predict(prediction(*words))
    assert not (tmp_path / "out" / "metrics.json").exists()
    resumed = api.predict(prediction(*words))
    assert 16 <= resumed.found < 40
    assert (resumed.folder / "predictions.jsonl").read_bytes() == whole


def test_answers_do_not_depend_on_what_shares_their_batch_also_where_they_are_drawn(prediction, tmp_path):
    drawn = ["predict.temperature=1.0", "predict.seed=5"]
    many = api.predict(prediction(*drawn, f"output_dir={tmp_path / 'many'}"))
    single = api.predict(prediction(*drawn, f"output_dir={tmp_path / 'single'}", "engine.max_rows=1"))
    assert lines(many.folder) == lines(single.folder)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.jsonl", "predict.json"])
@pytest.mark.parametrize("how", ["a folder", "a broken link"])
def test_a_folder_in_the_place_of_a_result_is_refused_at_once(prediction, tmp_path, name, how):
    place = tmp_path / "out" / name
    place.parent.mkdir()
    place.mkdir() if how == "a folder" else place.symlink_to("/nothing/there")
    with pytest.raises(ConfigError, match=f"the file {name} can be written"):
        api.predict(prediction())
    assert [path.name for path in place.parent.iterdir()] == [name]


@pytest.mark.parametrize("content", ["null", "[" * 100_000, "[]"])
def test_predictions_whose_settings_are_damaged_are_not_continued(prediction, content):
    done = api.predict(prediction())
    (done.folder / "predict.json").write_text(content)
    with pytest.raises(ConfigError, match="output_dir holds"):
        api.predict(prediction())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "adapter_model.safetensors"])
def test_a_damaged_model_or_adapter_is_refused_before_anything_is_written(prediction, model, adapters, tmp_path, name):
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(adapters["one"], tmp_path / "adapter")
    for folder in ("model", "adapter"):
        if (tmp_path / folder / name).exists():
            (tmp_path / folder / name).write_text("[" * 100_000)
    with pytest.raises(ConfigError):
        api.predict(prediction(f"model.path={tmp_path}/model", f"predict.adapters={{one: {tmp_path}/adapter}}"))
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(prediction):
    api.predict(prediction())
    with pytest.raises(ConfigError, match=r"predict\.temperature from 0\.0 to 0\.5"):
        api.predict(prediction("predict.temperature=0.5"))
    assert api.predict(prediction("predict.temperature=0.5", "predict.resume=never")).found == 0


def test_adapters_in_another_order_do_not_continue_the_lines(prediction, adapters):
    one, two = (f"{name}: '{adapters[name]}'" for name in ("one", "two"))
    done = api.predict(prediction(f"predict.adapters={{{one}, {two}}}", "predict.max_new_tokens=1"))
    file = done.folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ConfigError, match="order of the models"):
        api.predict(prediction(f"predict.adapters={{{two}, {one}}}", "predict.max_new_tokens=1"))


@pytest.mark.parametrize("changed", ["weights", "config", "chat template", "merged adapter"])
def test_answers_of_other_files_in_the_models_folder_are_not_kept(prediction, model, adapters, tmp_path, changed):
    folder, under = shutil.copytree(model, tmp_path / "model"), shutil.copytree(adapters["one"], tmp_path / "under")
    words = [f"model.path={folder}", f"model.merged_adapters=['{under}']", "predict.max_new_tokens=1"]
    done = api.predict(prediction(*words))
    assert api.predict(prediction(*words)).found == done.rows
    if changed == "weights":
        other: Any = AutoModelForCausalLM.from_pretrained(folder)
        other.lm_head.weight.data.neg_()
        other.save_pretrained(folder)
    elif changed == "config":
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.5}))
    elif changed == "chat template":
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + "{# another #}")
    else:
        shutil.copytree(adapters["two"], under, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match="holds other predictions; what changed: contents of the model"):
        api.predict(prediction(*words))


def test_columns_with_the_names_of_keys_and_with_those_that_they_get_stand_side_by_side():
    columns = {"row": 1, "input_row": 2, "input_input_row": 3, "input_text": 4, "text": 5}
    written = json.loads(line({"row": 7, "model": "base"}, columns))
    assert written["row"] == 7 and len(written) == len(columns) + 2 and written["input_text"] == 4
    assert columns_of(written) == columns


def test_starting_anew_leaves_no_rewards_of_before(prediction):
    done = api.predict(prediction("predict.max_new_tokens=1"))
    (done.folder / "rewards.jsonl").write_text("{}")
    api.predict(prediction("predict.max_new_tokens=1", "predict.resume=never"))
    assert not (done.folder / "rewards.jsonl").exists()


def test_given_answers_are_scored_as_the_model_itself_scores_them(prediction, model, chat_rows):
    done = api.predict(prediction("predict.score=true", "predict.generate=false", "data.max_samples=5"))
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    total = tokens = 0.0
    for one in lines(done.folder):
        prompt = tokenizer.apply_chat_template(one["messages"][:-1], add_generation_prompt=True, return_dict=False)
        answer = [*tokenizer.encode(one["label"]), tokenizer.eos_token_id]
        logits = loaded(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        assert one["logprob"] == pytest.approx(expected, abs=1e-3)
        assert one["label_tokens"] == len(answer)
        total, tokens = total + expected, tokens + len(answer)
    assert done.metrics["base"]["perplexity"] == pytest.approx(float(torch.tensor(-total / tokens).exp()), rel=1e-4)


def test_rows_that_cannot_be_asked_keep_their_place_and_more_of_them_than_allowed_stop_it_before_a_model_is_loaded(
    prediction, tmp_path
):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "label": 7}, {"messages": []}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"1 of 2 rows can't be asked"):
        api.predict(prediction(f"data.path={path}"))
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    done = api.predict(prediction(f"data.path={path}", "data.max_bad_fraction=0.5"))
    good, bad = lines(done.folder)
    assert good["label"] is None and good["input_label"] == 7 and good["predict"] is not None
    assert bad["row"] == 2 and bad["predict"] is None and "messages" in bad["error"]
    assert done.metrics["base"] == {"rows": 2, "failed": 1, "compared": 0}


def test_a_prompt_that_is_longer_than_the_model_is_told_in_its_line(prediction, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 600}]}) + "\n")
    (one,) = lines(api.predict(prediction(f"data.path={path}")).folder)
    assert one["error"] == "it is longer than 512 tokens"


def test_a_column_with_a_lone_surrogate_is_carried_along(prediction, tmp_path):
    """JSON can say one, and UTF-8 has no bytes for it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}], "note": "\ud800!"}) + "\n")
    (line,) = lines(api.predict(prediction(f"data.path={rows}")).folder)
    assert line["note"] == "\ud800!" and "error" not in line


def test_a_number_that_json_does_not_have_is_carried_along_as_its_name(prediction, tmp_path):
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": role, "content": "hello"} for role in ("user", "assistant")]
    rows.write_text(json.dumps({"messages": messages, "score": math.nan, "each": [1.0, {"low": -math.inf}]}) + "\n")
    text = (api.predict(prediction(f"data.path={rows}")).folder / "predictions.jsonl").read_text()
    one = json.loads(text, parse_constant=pytest.fail)
    assert (one["score"], one["each"]) == ("NaN", [1.0, {"low": "-Infinity"}])


def test_a_perplexity_that_is_too_large_for_a_number_is_infinite(tmp_path):
    own = {"row": 1, "model": "base", "prompt": "p", "predict": None, "label": "a", "logprob": -2000.0, "label_tokens": 2}
    (tmp_path / "predictions.jsonl").write_text(line(own, {}))
    assert _measured(tmp_path, None, [])["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1 / 0", r"ZeroDivisionError: division by zero, line 2 of .*metric\.py"),
        ("return {'share': float('nan')}", "share is nan"),
        ("return {'share': [1]}", r"share is \[1\]"),
        ("return None", "number is None"),
    ],
)
def test_a_function_that_gives_no_number_is_named_and_the_answers_are_kept(prediction, tmp_path, body, said):
    file = tmp_path / "metric.py"
    file.write_text(f"def number(answers, references, rows):\n    {body}\n")
    run = prediction(f"predict.metrics=[{file}:number]")
    with pytest.raises(ConfigError, match=said):
        api.predict(run)
    answered = lines(tmp_path / "out")
    file.write_text("def number(answers, references, rows):\n    return len(answers)\n")
    again = api.predict(run)
    assert again.generated_tokens == 0 and lines(again.folder) == answered
    assert again.metrics["base"]["number"] == 12


def test_a_file_of_a_metric_that_fails_as_it_is_read_is_named(prediction, tmp_path):
    file = tmp_path / "metric.py"
    file.write_text("nothing_here\n")
    with pytest.raises(ConfigError, match=r"predict\.metrics must name a function that can be imported \(NameError"):
        api.predict(prediction(f"predict.metrics=[{file}:number]"))


def test_llamafactory_s_files_are_written_on_request(prediction, model):
    folder = api.predict(prediction("predict.llamafactory_files=true")).folder
    theirs = [json.loads(text) for text in (folder / "generated_predictions.jsonl").read_text().splitlines()]
    assert [list(one) for one in theirs] == [["prompt", "predict", "label"]] * 12
    tokenizer = AutoTokenizer.from_pretrained(model)
    for one, ours in zip(theirs, lines(folder), strict=True):
        messages = ours["messages"][:-1]
        assert one["prompt"] == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert (one["predict"], one["label"]) == (ours["predict"], ours["label"])
    assert json.loads((folder / "predict_results.json").read_text())["rows"] == 12


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["predict.run=/nothing/there", "model.path=null"], "predict.run"),
        (["predict.adapters={one: /nothing/there}"], "predict.adapters.one"),
        (["predict.adapters={base: /nothing/there}"], "base"),
        (["predict.metrics=[blue]"], "predict.metrics"),
        (["predict.adapters={a: x, b: y}", "predict.llamafactory_files=true"], "predict.llamafactory_files must be false"),
        (["predict.metrics=[nothing.py:there]"], "there is no file nothing.py"),
        (["data.path=/nothing/there.jsonl"], "/nothing/there.jsonl"),
        (["output_dir=/dev/null/there"], "output_dir"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(prediction, tmp_path, settings, said):
    run = prediction(*settings)
    with pytest.raises(UserError) as raised:
        api.predict(run)
    assert said in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["output_dir=null"], "output_dir must be given"),
        (["predict.run=x"], "model can't be combined with predict.run"),
        (["data.streaming=true"], "data.streaming is for training"),
        (["data.eval_fraction=0.1"], "data.eval_fraction is for training"),
        (["predict.generate=false"], "predict.generate must be true"),
        (["predict.metrics=[f1,f1]"], "predict.metrics must hold each metric once"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(prediction, settings, said):
    with pytest.raises(ConfigError, match=said):
        prediction(*settings)
