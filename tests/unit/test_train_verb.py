"""`api.train` on a tiny model: what it writes, refuses, and repeats."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_llm import ConfigError, DataError, Diverged, ResourceError, api, load_config
from raytune_llm.commands.train import chat_command, held_out_figures, merge_command, next_command
from raytune_llm.models.adapters import merge
from raytune_llm.report.updates import RunStarted
from raytune_llm.train import checkpoint_files
from raytune_llm.train.checkpoint_files import complete_steps
from tests.group import metrics
from tests.limits import no_file_larger_than
from tests.models import saved_llama
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def done(chat_rows, cache, tmp_path_factory):
    run = tiny_run(chat_rows, cache, tmp_path_factory.mktemp("done"), "train.max_steps=4", "checkpoint.every_steps=2")
    return run, api.train(run)


def test_the_output_folder_is_as_documented(done):
    run, result = done
    folder = Path(run.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert {"run.yaml", "checkpoints", "final", "metrics.jsonl", "loss.png", "summary.json"} <= names
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["loss_first"] == metrics(run.output_dir)[0]["loss"]
    assert set(summary["wall_s"]) == {"start", "prepare", "load", "train", "save", "total", "evaluate"}
    first = metrics(run.output_dir)[0]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_seen", "tokens_per_s", "memory_gib"} <= set(first)
    assert first["step"] == 1
    assert (result.final / "README.md").exists()


def test_a_finished_run_is_not_done_again(done):
    run, first = done
    again = api.train(run)
    assert again.already_done
    assert again.summary == first.summary


def test_the_written_run_runs_again(done, tmp_path):
    run, first = done
    again = load_config("train", [f"output_dir={tmp_path}"], config_dir=run.output_dir, config_name="run")
    assert api.train(again).summary.loss_last == first.summary.loss_last


def test_the_command_that_is_named_next_can_be_typed(done):
    run, first = done
    command = next_command(run, first.final)
    assert command is not None
    *_, folder, _, name, adapter, output = command.split()
    following = load_config("train", [adapter, output], config_dir=folder, config_name=name)
    assert following.adapter.path == str(first.final) and following.output_dir == f"{run.output_dir}_next"


def test_the_command_after_full_fine_tuning_works_as_it_is_pasted(done, chat_rows, cache, tmp_path):
    folder = tmp_path / "my runs" / "it's here"
    run = tiny_run(chat_rows, cache, folder, "adapter=none", "train.max_steps=4", "optimizer.lr=1e-2", "data.eval_fraction=0")
    first = api.train(run)
    command = next_command(run, first.final)
    assert command is not None
    words = shlex.split(command)
    folder_of_run, name, *overrides = words[4], words[6], *words[7:]
    following = load_config("train", overrides, config_dir=folder_of_run, config_name=name)
    assert following.model.path == str(folder / "final") and following.output_dir == f"{folder}_next"
    api.train(following)
    assert metrics(following.output_dir)[0]["loss"] < metrics(run.output_dir)[0]["loss"]


def test_held_out_figures_are_told_from_before_the_first_step_to_the_last():
    start = {"step": 0, "eval_loss": 0.7, "eval_rewards/margins": -0.1, "eval_rewards/accuracies": 0.25}
    end = {"step": 9, "eval_loss": 0.5, "eval_rewards/margins": 2.0, "eval_rewards/accuracies": 0.75}
    told = dict(held_out_figures([start, {"step": 1, "loss": 3.0}, {**end, "step": 5}, end]))
    assert told == {
        "loss, held out": "0.7000 -> 0.5000",
        "margin, held out": "-0.1 -> 2",
        "better one right, held out": "25.0% -> 75.0%",
    }


def test_a_policy_that_is_its_reference_is_told_to_prefer_neither_answer():
    start = {"step": 0, "eval_loss": 0.7, "eval_rewards/margins": 0.0, "eval_rewards/accuracies": 0.0}
    end = {"step": 9, "eval_loss": 0.5, "eval_rewards/margins": 2.0, "eval_rewards/accuracies": 0.75}
    assert dict(held_out_figures([start, end]))["better one right, held out"] == "75.0%"


@pytest.mark.parametrize(
    "records", [[{"step": 5, "eval_loss": 0.5}], [{"step": 2, "eval_loss": 0.9}, {"step": 5, "eval_loss": 0.5}]]
)
def test_without_an_evaluation_before_the_first_step_only_the_last_is_told(records):
    assert held_out_figures(records) == [("loss, held out", "0.5000")]
    assert held_out_figures([]) == []


def test_an_adapter_on_merged_ones_names_no_model_that_others_would_load_and_the_command_that_makes_its_base(
    chat_rows, cache, tmp_path
):
    hub = ["model=hub", f"model.path={saved_llama(tmp_path / 'base')}", "model.tokenizer=bytes", "train.max_steps=2"]
    hub += ["optimizer.lr=1e-2", "data.eval_fraction=0"]
    first = api.train(tiny_run(chat_rows, cache, tmp_path / "one", *hub))
    run = tiny_run(chat_rows, cache, tmp_path / "two", *hub, f"model.merged_adapters=['{first.final}']")
    second = api.train(run)
    config = json.loads((second.final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{tmp_path / 'base'} with {first.final} merged"
    assert "adapter of that merged model" in (second.final / "README.md").read_text()

    command = merge_command(run, second.final)
    assert command is not None
    _, _, _, verb, *words = shlex.split(command)
    api.export(load_config(verb, [*words, "export.check=false"]))
    base, ids = Path(f"{second.final.parent}_base"), torch.arange(20)[None]
    elsewhere = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(second.final))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merge(ours, [str(first.final)])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(ours, str(second.final))(ids).logits
        torch.testing.assert_close(elsewhere(ids).logits, expected, atol=1e-5, rtol=1e-5)

    told: list[Any] = []
    api.train(tiny_run(chat_rows, cache, tmp_path / "three", *hub, f"adapter.path={second.final}"), on_update=told.append)
    lines = [line for update in told if isinstance(update, RunStarted) for line in update.choices]
    assert any(f"was trained on {config['base_model_name_or_path']}, not on {tmp_path / 'base'}" in line for line in lines)


def test_no_base_is_to_be_made_where_there_is_one(tmp_path):
    assert merge_command(smollm2(tmp_path), tmp_path) is None
    assert merge_command(smollm2(tmp_path, "adapter=none", "model.merged_adapters=[a]"), tmp_path) is None


@pytest.mark.parametrize("stage", [("stage=reward", "data=sharegpt_pairs"), ("stage=pretrain", "data=text", "adapter=none")])
def test_nothing_is_named_next_where_a_model_can_not_go_on_as_it_is(stage, tmp_path):
    assert next_command(tiny_run("rows.json", "cache", tmp_path, *stage), tmp_path / "final") is None


def test_a_pretrained_model_that_knows_a_chat_template_is_to_learn_to_chat_next(tmp_path):
    run = tiny_run("texts.txt", "cache", tmp_path, "stage=pretrain", "data=text", "adapter=none")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    command = next_command(run, tmp_path)
    assert command is not None
    assert load_config("train", command.split()[3:]).stage.name == "sft"


def smollm2(folder, *overrides):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return tiny_run("rows.json", "cache", folder, "model=smollm2_135m", *overrides)


def test_a_model_that_chats_is_to_be_talked_with_next(tmp_path):
    command = chat_command(smollm2(tmp_path), tmp_path)
    assert command == f"python -m raytune_llm chat model=smollm2_135m chat.adapter={tmp_path}"
    assert command is not None and load_config("chat", command.split()[4:]).chat.adapter == str(tmp_path)
    whole = chat_command(smollm2(tmp_path, "adapter=none"), tmp_path)
    assert whole is not None and load_config("chat", whole.split()[4:]).model.path == str(tmp_path)
    named = chat_command(smollm2(tmp_path, "data.template=chatml", "quantization=bnb_nf4"), tmp_path)
    assert named is not None
    run = load_config("chat", named.split()[4:])
    assert (run.chat.template, run.quantization.name) == ("chatml", "bnb_nf4")


@pytest.mark.parametrize("other", [["adapter=dora"], ["stage=reward", "data=sharegpt_pairs"], ["model=tiny_random"]])
def test_nobody_is_sent_to_talk_with_what_can_not_be_served(other, tmp_path):
    assert chat_command(smollm2(tmp_path, *other), tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: replace(run, optimizer=replace(run.optimizer, lr=0.5)), "optimizer.lr from 0.001 to 0.5"),
        (lambda run: replace(run, data=replace(run.data, max_length=128)), "data.max_length from 256 to 128, the train data"),
    ],
)
def test_a_changed_run_in_the_same_folder_is_refused_with_what_changed(done, change, said):
    with pytest.raises(ConfigError, match="holds another run") as error:
        api.train(change(done[0]))
    assert said in str(error.value)


def test_resume_must_needs_a_checkpoint(chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match="can't be must"):
        api.train(tiny_run(chat_rows, cache, tmp_path, "resume=must"))


def test_resume_never_starts_anew(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path, "train.max_steps=2")
    first = api.train(run)
    again = api.train(replace(run, resume="never", train=replace(run.train, seed=7)))
    assert again.resumed_from is None
    assert again.summary.loss_first != first.summary.loss_first


def test_a_half_written_checkpoint_is_swept_and_never_read(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path, "train.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=3")
    whole = api.train(run)
    (tmp_path / "checkpoints/step-3/COMPLETE").unlink()
    (tmp_path / "summary.json").unlink()
    again = api.train(run)
    assert again.resumed_from == 2
    assert again.summary.loss_last == whole.summary.loss_last


def test_a_checkpoint_with_a_corrupt_state_is_named(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path, "train.max_steps=2")
    api.train(run)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "checkpoints/step-2/state/.metadata").write_bytes(b"")
    with pytest.raises(DataError, match=r"no usable checkpoint: step-2 can't be used \(\.metadata has other bytes"):
        api.train(run)


def test_no_room_for_a_checkpoint_is_said_and_leaves_nothing_half_written(chat_rows, cache, tmp_path):
    run = tiny_run(chat_rows, cache, tmp_path, "adapter=none", "train.max_steps=2")
    said = r"checkpoint step-2 can't be written .* repeating the command resumes"
    with no_file_larger_than(100_000), pytest.raises(ResourceError, match=said):
        api.train(run)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert api.train(run).summary.steps == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_half_precision_learns_as_well(precision, adapter, chat_rows, cache, tmp_path):
    overrides = [
        f"adapter={adapter}",
        f"train.precision={precision}",
        "train.max_steps=8",
        "optimizer.lr=1e-2",
        "schedule=constant",
    ]
    summary = api.train(tiny_run(chat_rows, cache, tmp_path, *overrides)).summary
    assert summary.loss_first is not None and summary.loss_last is not None
    assert summary.loss_last < summary.loss_first - 0.3


def test_steps_with_a_broken_gradient_change_nothing_and_end_the_run_at_the_limit(chat_rows, cache, tmp_path):
    # So high a rate breaks the weights in the first step; from then on every gradient is broken.
    overrides = [
        "adapter=none",
        "optimizer.lr=1e30",
        "schedule=constant",
        "train.max_nonfinite_steps=2",
        "schedule.warmup_ratio=0",
    ]
    with pytest.raises(Diverged, match=r"3 steps up to step \d+ had a nonfinite gradient"):
        api.train(tiny_run(chat_rows, cache, tmp_path, *overrides))
    assert metrics(tmp_path)[-1]["nonfinite_steps"] == 3


def test_weights_that_the_last_update_broke_are_not_written(chat_rows, cache, tmp_path):
    overrides = ["optimizer.lr=1e30", "optimizer.weight_decay=1e10", "schedule=constant", "schedule.warmup_ratio=0"]
    run = tiny_run(chat_rows, cache, tmp_path, *overrides, "adapter=none", "train.max_steps=1", "data.eval_fraction=0")
    with pytest.raises(Diverged, match=r"has values that are no numbers after step 1: the model is unusable"):
        api.train(run)
    assert math.isfinite(metrics(tmp_path)[-1]["loss"]) and not (tmp_path / "final").exists()


def test_early_stopping_keeps_the_best(chat_rows, cache, tmp_path):
    overrides = ["train.eval_every_steps=1", "train.early_stopping=2", "checkpoint.final=best", "checkpoint.every_steps=1"]
    overrides += ["optimizer.lr=1e-12", "optimizer.weight_decay=0", "checkpoint.keep=1"]  # so little that no loss gets better
    run = tiny_run(chat_rows, cache, tmp_path, *overrides)
    result = api.train(run)
    evals = [record["eval_loss"] for record in metrics(tmp_path) if "eval_loss" in record]
    assert len(evals) == 3
    progress, _ = checkpoint_files.read_progress(tmp_path / "checkpoints", complete_steps(tmp_path / "checkpoints")[-1])
    assert progress.best_step == 1
    assert complete_steps(tmp_path / "checkpoints") == [1, 3]
    assert result.summary.steps == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.max_length=4096"], r"data.max_length must be at most the model's 2048 positions, got 4096"),
        (["adapter.targets=[nope]"], r"adapter.targets must name linear layers"),
        (["adapter.path=/no/such/folder"], r"adapter.path must be a folder with adapter_config.json"),
        (["model.config.model_type=nope"], r"model.config.model_type must be one that transformers has"),
        (["model=hub", "model.path=/no/such/folder"], r"model.path"),
    ],
)
def test_what_only_the_model_can_refuse_is_refused_by_its_setting(overrides, said, chat_rows, cache, tmp_path):
    with pytest.raises(ConfigError, match=said):
        api.train(tiny_run(chat_rows, cache, tmp_path, *overrides))


def test_activation_checkpointing_and_compiled_chunks_do_not_show(chat_rows, cache, tmp_path, done):
    run = tiny_run(chat_rows, cache, tmp_path, "train.max_steps=4", "train.activation_checkpointing=full")
    assert api.train(run).summary.loss_last == pytest.approx(done[1].summary.loss_last, rel=1e-6)


def test_the_saved_model_names_what_ends_an_answer(done):
    config = json.loads((done[1].final / "generation_config.json").read_text())
    assert config["eos_token_id"] == [257], "the byte tokenizer's <|im_end|>"


def test_every_eval_source_has_its_loss_and_all_have_theirs_together(chat_rows, cache, tmp_path):
    lines = Path(chat_rows).read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:7]), ("b", lines[7:10]), ("both", lines[:10])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))

    def evaluated(eval_path: str) -> dict:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        settings = ["train.max_steps=1", "data.eval_fraction=0", f"data.eval_path={eval_path}"]
        api.train(tiny_run(chat_rows, cache, folder, *settings))
        return next(record for record in metrics(str(folder)) if "eval_loss" in record)

    apart = evaluated(f"{{a:{tmp_path / 'a.jsonl'},b:{tmp_path / 'b.jsonl'}}}")
    alone = [evaluated(str(tmp_path / f"{name}.jsonl"))["eval_loss"] for name in ("a", "b", "both")]
    losses = [apart[f"eval_{name}loss"] for name in ("a_", "b_", "")]
    assert losses == pytest.approx(alone, rel=1e-5)
