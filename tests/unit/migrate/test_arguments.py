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
