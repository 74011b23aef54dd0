from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llm import api, load_config
from raytune_llm.__main__ import main
from raytune_llm.errors import ConfigError
from raytune_llm.migrate.arguments import ARGUMENTS
from raytune_llm.migrate.translation import translate

MODEL = {"model_name_or_path": "some/model", "template": "llama3", "dataset": "identity"}


def translated(world_size=None, **arguments):
    found = translate({**MODEL, **arguments}, world_size=world_size, dataset_info=None, find=lambda path: None)
    assert not found.refused, found.refused
    return found.settings


def refused(**arguments):
    found = translate({**MODEL, **arguments}, world_size=None, dataset_info=None, find=lambda path: None)
    return {outcome.argument: outcome.text for outcome in found.refused}


def test_what_a_file_does_not_say_has_llamafactorys_default(training_file, factory):
    api.import_(load_config("import", [f"file={training_file(**MODEL)}", "name=x"]))
    run = load_config("train", ["+experiment=x"], config_dir="conf")
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.targets) == (8, 16.0, "all-linear")
    assert (run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.beta2) == (5e-5, 0.0, 0.999)
    assert (run.schedule.name, run.schedule.warmup_ratio) == ("linear", 0.0)
    assert (run.train.epochs, run.train.micro_batch_size, run.train.global_batch_size) == (3, 8, 8)
    assert (run.train.max_grad_norm, run.train.seed, run.train.log_every_steps) == (1.0, 42, 500)
    assert (run.data.max_length, run.data.packing, run.data.enable_thinking) == (2048, False, True)
    assert (run.checkpoint.every_steps, run.tracking.name, run.strategy.name) == (500, "none", "ddp")


def test_an_imported_experiment_trains(training_file, factory):
    arguments = {"cutoff_len": 128, "num_train_epochs": 2, "per_device_train_batch_size": 2, "output_dir": "saves/x"}
    trained = MODEL | {"dataset": "identity,alpaca_en_demo"} | arguments
    assert main(["import", str(training_file(**trained)), "name=x"]) == 0
    overrides = ["+experiment=x", "model=tiny_random", "model.path=null", "model.tokenizer=bytes", "model.weights=random"]
    run = load_config("train", [*overrides, "resources=inline", f"data.cache={factory / 'cache'}"], config_dir="conf")
    result = api.train(run)
    assert result.summary.steps == 2 * 5  # ten rows, two at a time
    assert (factory / "saves/x/final/adapter_config.json").exists()


def test_the_verb_shows_what_became_of_every_argument(training_file, factory, capsys):
    code = main(["import", str(training_file("llama3_sft", **MODEL, plot_loss=True, learning_rate=1e-4))])
    out = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert "mapped learning_rate: 0.0001 optimizer.lr=0.0001" in out
    assert "no effect plot_loss: True" in out
    assert "python -m raytune_llm --config-dir conf +experiment=llama3_sft" in out
    assert (factory / "conf/experiment/llama3_sft.yaml").exists()


def test_everything_that_is_refused_is_said_at_once_and_nothing_is_written(training_file, factory, capsys):
    code = main(
        ["import", str(training_file(**MODEL, use_galore=True, galore_proj_type="right", learning_rat=1e-4, stage="ppo"))]
    )
    err = capsys.readouterr().err
    assert code == 2
    assert "galore_proj_type: must be std here: the shorter side is projected" in err
    assert "learning_rat: is no argument of LLaMA-Factory 0.9.5 (did you mean learning_rate?)" in err
    assert "stage: ppo is not supported yet" in err
    assert not (factory / "conf").exists()


def test_what_has_no_effect_stands_in_the_experiment_as_a_comment(training_file, factory):
    path = api.import_(load_config("import", [f"file={training_file(**MODEL, overwrite_cache=True)}"]))
    assert "#   overwrite_cache: token stores" in path.read_text()


def test_a_secret_is_not_written(training_file, factory):
    path = api.import_(load_config("import", [f"file={training_file(**MODEL, hf_hub_token='hf_abc', swanlab_api_key='abc')}"]))
    assert "abc" not in path.read_text()


def test_another_experiment_is_not_overwritten_unless_asked_for(training_file, factory):
    first, second = training_file("first", **MODEL), training_file("second", **MODEL, seed=7)
    api.import_(load_config("import", [f"file={first}", "name=x"]))
    api.import_(load_config("import", [f"file={first}", "name=x"]))
    with pytest.raises(ConfigError, match=r"name must be new: .*x\.yaml is another experiment"):
        api.import_(load_config("import", [f"file={second}", "name=x"]))
    api.import_(load_config("import", [f"file={second}", "name=x", "overwrite=true"]))
    assert load_config("train", ["+experiment=x"], config_dir="conf").train.seed == 7


def test_the_data_declaration_is_found_above_the_file_from_any_folder(training_file, factory, monkeypatch, tmp_path_factory):
    file = training_file(**MODEL)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    api.import_(load_config("import", [f"file={file}", "name=x"]))
    assert load_config("train", ["+experiment=x"], config_dir="conf").data.dataset_info == str(factory / "data/dataset_info.json")


def test_a_declaration_that_is_not_here_is_taken_over_unchecked(training_file, factory, capsys):
    (factory / "data/dataset_info.json").unlink()
    assert main(["import", str(training_file(**MODEL)), "name=x"]) == 0
    assert "data/dataset_info.json does not exist" in capsys.readouterr().out
    assert load_config("train", ["+experiment=x"], config_dir="conf").data.dataset_info == "data/dataset_info.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dataset": "identiti"}, "Did you mean identity?"),
        ({"dataset": "dpo_en_demo"}, "holds pairs of answers"),
        ({"dataset": "identity", "stage": "dpo"}, "holds no pairs of answers"),
        ({"dataset": "identity", "stage": "kto"}, "identity has no column kto_tag"),
    ],
)
def test_data_sets_are_checked_against_the_declaration_and_the_stage(training_file, arguments, said):
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        api.import_(load_config("import", [f"file={training_file(**MODEL | arguments)}"]))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("a: [b", "must be a YAML file"), ("- a", "key: value"), ("a: \xe9", "must be a YAML file")],
)
def test_a_file_that_is_no_yaml_of_arguments_is_refused(factory, capsys, content, said):
    if content is not None:
        (factory / "mine.yaml").write_bytes(content.encode("latin-1"))
    assert main(["import", "mine.yaml"]) == 2
    assert said in capsys.readouterr().err


def test_a_file_must_be_given(capsys):
    assert main(["import"]) == 2
    assert "file must name a training file" in capsys.readouterr().err


def test_a_name_is_that_of_a_file(capsys):
    assert main(["import", "mine.yaml", "name=a/b"]) == 2
    assert "name must consist of letters" in capsys.readouterr().err


def test_any_path_can_be_typed(factory, capsys):
    (factory / "it's mine, v2.5.yaml").write_text(json.dumps(MODEL))
    assert main(["import", "it's mine, v2.5.yaml"]) == 0
    assert load_config("train", ["+experiment=it_s_mine__v2.5"], config_dir="conf").model.path == "some/model"


def test_a_global_batch_is_that_of_all_gpus():
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert translated(world_size=8, **batch)["train.global_batch_size"] == 64
    assert translated(ray_num_workers=3, **batch)["train.global_batch_size"] == 24


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        ({"warmup_ratio": 0.1}, (0.1, None)),
        ({"warmup_steps": 100}, (None, 100)),
        ({"warmup_steps": 0.05}, (0.05, None)),
        ({"warmup_steps": 0, "warmup_ratio": 0.1}, (0.1, None)),
        ({"warmup_steps": 100, "lr_scheduler_type": "constant"}, (0.0, None)),
    ],
)
def test_warm_up_in_parts_and_in_steps(arguments, warmup):
    settings = translated(**arguments)
    assert (settings["schedule.warmup_ratio"], settings["schedule.warmup_steps"]) == warmup


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "learning_rate": 1e-4},
         {"schedule": "cosine", "schedule.floor": 0.1}),
        ({"lr_scheduler_type": "warmup_stable_decay"}, {"schedule": "wsd", "schedule.decay_ratio": None}),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
         {"schedule.power": 2.0, "schedule.lr_end": 1e-7}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.2}'}, {"schedule.floor": 0.2}),
        ({"lora_rank": None, "enable_thinking": None}, {"adapter.rank": 8, "data.enable_thinking": None}),
        ({"max_steps": 50}, {"train.max_steps": 50, "train.epochs": 50}),
        ({"max_grad_norm": 0}, {"train.max_grad_norm": None}),
        ({"pure_bf16": True}, {"train.precision": "bf16"}),
        ({"disable_gradient_checkpointing": True}, {"train.activation_checkpointing": "none"}),
        ({"use_unsloth_gc": True}, {"train.activation_checkpointing": "offload"}),
        ({"report_to": ["wandb"], "run_name": "first"}, {"tracking": "wandb", "tracking.run": "first"}),
        ({"use_swanlab": True, "swanlab_project": "mine"}, {"tracking": "swanlab", "tracking.project": "mine"}),
        ({"load_best_model_at_end": True}, {"checkpoint.final": "best"}),
        ({"save_strategy": "epoch", "save_total_limit": 3}, {"checkpoint.every_steps": None, "checkpoint.keep": 3}),
        ({"mix_strategy": "interleave_over", "dataset": "a,b", "interleave_probs": "0.3, 0.7"}, {"data.mix_weights": [0.3, 0.7]}),
        ({"dataset_dir": "ONLINE", "dataset": "tatsu-lab/alpaca"}, {"data.path": "tatsu-lab/alpaca", "data.dataset_info": None}),
        ({"stage": "pt"}, {"data.packing": True, "stage": "pretrain"}),
        ({"stage": "dpo", "packing": True}, {"data.packing": False, "stage.loss": "sigmoid"}),
        ({"stage": "dpo", "pref_bco_weight": 1.0}, {"stage.loss": {"sigmoid": 0.5, "bco_pair": 0.5}}),
        ({"eval_dataset": "a,b", "eval_strategy": "epoch"}, {"data.eval_names": ["a", "b"], "train.eval_every_steps": None}),
        ({"resume_from_checkpoint": True}, {"resume": "must"}),
        ({"num_train_epochs": 1.5}, {"train.epochs": 1.5}),
        ({"val_size": 100, "eval_strategy": "epoch"}, {"data.eval_rows": 100, "data.eval_fraction": 0.0}),
        ({"torch_compile": True, "enable_torch_profiler": True}, {"train.compile": True, "train.profile": True}),
        ({"evaluation_strategy": "steps", "val_size": 0.1, "logging_steps": 5}, {"train.eval_every_steps": 5}),
        ({"deepspeed": {"zero_optimization": {"stage": 1}}}, {"strategy": "zero1"}),
        ({"use_galore": True, "galore_rank": 64, "adam_beta2": 0.95},
         {"optimizer": "galore", "optimizer.rank": 64, "optimizer.update_every": 200, "optimizer.beta2": 0.95}),
        ({"use_apollo": True, "apollo_scale_type": "tensor", "apollo_rank": 1, "apollo_scale": 128},
         {"optimizer": "apollo", "optimizer.rank": 1, "optimizer.scale": 128.0, "optimizer.sizes": "tensor"}),
        ({"use_badam": True, "badam_switch_mode": "random"},
         {"optimizer": "badam", "optimizer.switch_every": 50, "optimizer.order": "random"}),
        ({"use_adam_mini": True, "use_muon": True}, {"optimizer": "adam_mini", "optimizer.eps": 1e-8}),
        ({"optim": "adamw_bnb_8bit"}, {"optimizer": "adamw_8bit"}),
        ({"optim": "paged_adamw_8bit"}, {"optimizer": "paged_adamw_8bit"}),
        ({"optim": "adafactor"}, {"optimizer": "adafactor"}),
        ({"optim": "lion_32bit"}, {"optimizer": "lion", "optimizer.beta2": 0.999}),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, {"optimizer": "schedule_free"}),
        ({"optim": "sgd", "weight_decay": 0.1}, {"optimizer": "sgd", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.1}),
        ({"fsdp": "shard_grad_op auto_wrap", "fsdp_config": {"offload_params": True}},
         {"strategy": "fsdp", "strategy.reshard": "grad_only", "strategy.offload": True}),
    ],
)  # fmt: skip
def test_arguments_become_settings(arguments, settings):
    found = translated(**arguments)
    assert {name: found[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("arguments", "blamed"),
    [
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "warmup_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"lora_rank": "eight"}, "lora_rank"),
        ({"bf16": "yes"}, "bf16"),
        ({"eval_strategy": False, "val_size": 0.1}, "eval_strategy"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"deepspeed": {"zero_optimization": 3}}, "deepspeed"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs"),
        ({"optim": "paged_adamw_32bit"}, "optim"),
        ({"optim": "q_galore_adamw8bit"}, "optim"),
        ({"optim": "galore_adamw"}, "optim"),
        ({"use_galore": True, "galore_target": "q_proj,v_proj"}, "galore_target"),
        ({"use_apollo": True, "apollo_proj": "svd"}, "apollo_proj"),
        ({"use_badam": True, "badam_mode": "ratio"}, "badam_mode"),
        ({"use_badam": True, "badam_switch_interval": -1}, "badam_switch_interval"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"report_to": "wandb,mlflow"}, "report_to"),
        ({"report_to": "neptune"}, "report_to"),
        ({"template": "no_such"}, "template"),
        ({"template": None, "tool_format": "qwen"}, "tool_format"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss"),
        ({"stage": "dpo", "neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"stage": "kto", "moe_aux_loss_coef": 0.001}, "moe_aux_loss_coef"),
        ({"stage": "dpo", "pref_loss": "simpo", "pref_ftx": 0.1}, "pref_ftx"),
        ({"resume_from_checkpoint": "saves/x/checkpoint-500"}, "resume_from_checkpoint"),
        ({"deepspeed": "mine.json"}, "deepspeed"),
        ({"deepspeed": {"optimizer": {"type": "AdamW"}}}, "deepspeed"),
        ({"fsdp": "hybrid_shard"}, "fsdp"),
        ({"dataset": None}, "dataset"),
        ({"dataset_dir": "ONLINE", "dataset": "a,b"}, "dataset"),
        ({"streaming": True}, "streaming"),
        ({"streaming": True, "max_steps": 10, "dataset": "a,b"}, "streaming"),
        ({"metric_for_best_model": "rouge", "load_best_model_at_end": True}, "metric_for_best_model"),
    ],
)
def test_a_value_without_an_equal_is_refused_under_its_own_name(arguments, blamed):
    assert list(refused(**arguments)) == [blamed]


def test_parts_of_what_is_off_have_no_effect_and_parts_of_what_is_refused_go_with_it():
    assert not refused(galore_rank=8, badam_mode="layer", freeze_trainable_layers=4, use_galore=False)
    found = translate(
        {**MODEL, "kt_lora_expert_num": 8, "use_kt": True}, world_size=None, dataset_info=None, find=lambda path: None
    )
    assert {outcome.argument for outcome in found.of("refused")} == {"kt_lora_expert_num", "use_kt"}
    assert [outcome.argument for outcome in found.refused] == ["use_kt"]


VALUES = (
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=4) | st.just([None]) | st.just({"a": 1})
)


@given(arguments=st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), VALUES, max_size=12))
def test_whatever_the_values_are_every_argument_has_an_outcome(arguments):
    found = translate(arguments, world_size=None, dataset_info=None, find=lambda path: None)
    assert arguments.keys() <= {outcome.argument for outcome in found.outcomes}


def test_numbers_are_read_as_llamafactory_reads_them(factory):
    lines = {**MODEL, "learning_rate": None}
    (factory / "mine.yaml").write_text(json.dumps(lines).replace("null", "1e-4"))
    api.import_(load_config("import", ["file=mine.yaml"]))
    assert load_config("train", ["+experiment=mine"], config_dir="conf").optimizer.lr == 1e-4
