from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from raytune_llm.migrate.argument_rules import Joined, NoEffect, PartOf
from raytune_llm.migrate.arguments import ARGUMENTS, DATA, FINETUNING, FORMER, GENERATING, GONE, MODEL, NEW, TRAINING
from raytune_llm.migrate.translation import translate

GROUPS = {
    "ModelArguments": MODEL,
    "DataArguments": DATA,
    "TrainingArguments": TRAINING,
    "FinetuningArguments": FINETUNING,
    "GeneratingArguments": GENERATING,
}
DEFAULTS = json.loads(Path(__file__).with_name("llamafactory_0_9_5.json").read_text())
"""Class -> argument -> default, of LLaMA-Factory 0.9.5 with transformers 5.6."""


@pytest.mark.parametrize("group", GROUPS)
def test_every_argument_is_known_and_no_other(group):
    assert GROUPS[group].keys() == DEFAULTS[group].keys()


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_are_those_of_llamafactory(group):
    wrong = {
        name: rule.default
        for name, rule in GROUPS[group].items()
        if not isinstance(rule, NoEffect | PartOf) and rule.default != DEFAULTS[group][name]
    }
    assert wrong == ({"do_train": True} if group == "TrainingArguments" else {})


def test_no_argument_is_in_two_groups():
    assert len(ARGUMENTS) == sum(map(len, (*GROUPS.values(), GONE, NEW)))
    assert not FORMER.keys() & ARGUMENTS.keys() and set(FORMER.values()) <= ARGUMENTS.keys()


def test_a_joined_argument_is_read_by_its_rule_and_a_rule_reads_known_arguments():
    beside = {"world_size", "dataset_info", "find"}
    for name, rule in ARGUMENTS.items():
        if isinstance(rule, Joined):
            parameters = inspect.signature(rule.rule).parameters.keys()
            assert name in parameters
            assert parameters - beside <= {name for name, rule in ARGUMENTS.items() if not isinstance(rule, NoEffect | PartOf)}


SWITCHES = sorted({(rule.switch, rule.on) for rule in ARGUMENTS.values() if isinstance(rule, PartOf)}, key=str)


@pytest.mark.parametrize(("switch", "on"), SWITCHES)
def test_a_part_is_one_of_an_argument_that_is_refused_when_it_is_on(switch, on):
    given = {"model_name_or_path": "m", "dataset": "d", switch: True if on is None else on}
    found = translate(given, world_size=None, dataset_info=None, find=lambda path: None)
    assert [outcome.argument for outcome in found.refused] == [switch]


@pytest.mark.parametrize(
    ("given", "overlong"),
    [
        ({}, "llamafactory"),
        ({"stage": "dpo"}, "llamafactory"),
        ({"stage": "pt"}, None),
        ({"stage": "pt", "packing": False}, "llamafactory"),
    ],
)
def test_rows_are_cut_as_llamafactory_cuts_them_where_they_are_cut_at_all(given, overlong):
    given = {"model_name_or_path": "m", "dataset": "d", "cutoff_len": 77, **given}
    settings = translate(given, world_size=None, dataset_info=None, find=lambda path: None).settings
    assert (settings["data.max_length"], settings.get("data.overlong")) == (77, overlong)


CHOICES: dict[str, tuple[object, ...]] = {
    # of the classes of arguments, as their types say
    "rope_scaling": ("linear", "dynamic", "yarn", "llama3"),
    "flash_attn": ("auto", "disabled", "sdpa", "fa2", "fa3"),
    "mixture_of_depths": ("convert", "load"),
    "init_special_tokens": ("noise_init", "desc_init", "desc_init_w_noise"),
    "quantization_method": ("bnb", "gptq", "awq", "aqlm", "quanto", "eetq", "hqq", "mxfp4", "fp8"),
    "quantization_bit": (2, 3, 4, 5, 6, 8),
    "quantization_type": ("fp4", "nf4"),
    "stage": ("pt", "sft", "rm", "ppo", "dpo", "kto"),
    "finetuning_type": ("lora", "oft", "freeze", "full"),
    "pref_loss": ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"),
    "galore_proj_type": ("std", "reverse_std", "right", "left", "full"),
    "apollo_proj": ("svd", "random"),
    "apollo_proj_type": ("std", "right", "left"),
    "apollo_scale_type": ("channel", "tensor"),
    "badam_mode": ("layer", "ratio"),
    "badam_switch_mode": ("ascending", "descending", "random", "fixed"),
    "mix_strategy": ("concat", "interleave_under", "interleave_over", "interleave_once"),
    **dict.fromkeys(
        (
            "shift_attn", "enable_liger_kernel", "upcast_layernorm", "upcast_lmhead_output", "resize_vocab", "use_llama_pro",
            "use_rslora", "use_dora", "pissa_init", "pissa_convert", "create_new_adapter", "use_galore", "galore_layerwise",
            "use_apollo", "apollo_layerwise", "apollo_scale_front", "use_badam", "use_adam_mini", "use_muon", "pure_bf16",
            "double_quantization", "train_from_scratch", "use_unsloth", "use_unsloth_gc", "disable_gradient_checkpointing",
            "use_dft_loss", "use_asft_loss", "use_eaft_loss", "fp8",
        ),
        (True, False),
    ),
}  # fmt: skip
"""Arguments of models, adapters and optimizers that say which, and what they can say in 0.9.5."""
SWITCHED_BY = {"galore": "use_galore", "apollo": "use_apollo", "badam": "use_badam"}
NEEDS = {
    "quantization_type": {"quantization_bit": 4}, "quantization_method": {"quantization_bit": 4}, "pref_loss": {"stage": "dpo"},
    "double_quantization": {"quantization_bit": 4}, "init_special_tokens": {"add_special_tokens": "<a>"},
}  # fmt: skip


@pytest.mark.parametrize("argument", CHOICES)
def test_every_choice_becomes_settings_or_is_refused_with_its_reason(argument):
    beside = NEEDS.get(argument, {}) | {switch: True for part, switch in SWITCHED_BY.items() if argument.startswith(part)}
    if beside.keys() & set(SWITCHED_BY.values()) or argument in SWITCHED_BY.values():
        beside["finetuning_type"] = "full"
    for choice in CHOICES[argument]:
        given = {"model_name_or_path": "m", "dataset": "d", **beside, argument: choice}
        found = translate(given, world_size=None, dataset_info=None, find=lambda path: None)
        blamed = {outcome.argument: outcome.text for outcome in found.refused}
        assert blamed.keys() <= {argument, *beside, "quantization_bit"}, blamed
        assert all(len(reason) > 15 for reason in blamed.values())
        assert blamed or found.settings


@pytest.mark.parametrize(("finetuning_type", "name"), [("lora", "lora"), ("freeze", "freeze")])
def test_new_blocks_are_the_last_of_each_stride_as_the_lengthened_model_says(finetuning_type, name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 40}))
    given = {"model_name_or_path": str(tmp_path), "dataset": "d", "finetuning_type": finetuning_type, "use_llama_pro": True}
    found = translate(
        {**given, "freeze_trainable_layers": 8},
        world_size=None,
        dataset_info=None,
        find=lambda path: path if Path(path).exists() else None,
    )
    assert not found.refused
    assert found.settings["adapter"] == name
    assert found.settings["adapter.layers"] == [4, 9, 14, 19, 24, 29, 34, 39]
    assert found.settings.get("adapter.last_layers") is None
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 41}))
    refused = translate(
        {**given, "freeze_trainable_layers": 8},
        world_size=None,
        dataset_info=None,
        find=lambda path: path if Path(path).exists() else None,
    ).refused
    assert [outcome.argument for outcome in refused] == ["freeze_trainable_layers"]
