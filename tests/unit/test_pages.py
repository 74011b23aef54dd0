"""Pages that are made from what the program does say what it does now."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import yaml

from raytune_llm.config.options import options
from tests.pages import models, support
from tests.pages.__main__ import DOCS
from tests.pages.smoke import Smoke

REMAKE = "python -m tests.pages makes it again"


def test_the_page_of_models_is_current() -> None:
    assert (DOCS / "models.md").read_text(encoding="utf-8") == models.page(), REMAKE


def test_the_page_of_what_goes_with_what_is_current() -> None:
    assert (DOCS / "support.md").read_text(encoding="utf-8") == support.page(), REMAKE


def test_every_pair_that_the_rules_let_through_was_run_and_no_other() -> None:
    assert support.recorded()["pairs"].keys() == support.accepted().keys(), "python -m tests.pages.smoke runs what was not run"


@pytest.mark.long
def test_a_pair_of_each_option_ends_as_it_is_recorded(tmp_path: Path) -> None:
    recorded = some_pairs(support.recorded()["pairs"])
    with Smoke(tmp_path) as smoke:
        assert {pair: smoke.outcome(support.accepted()[pair]) for pair in recorded} == recorded


def some_pairs(recorded: dict[str, str]) -> dict[str, str]:
    """Drawn so that each option that needs no GPU is in one of them."""
    drawn, seen = (
        [pair for pair, said in recorded.items() if said != support.RAN_ON_GPU and not support.NEEDS_GPU.search(said)],
        set[str](),
    )
    Random(0).shuffle(drawn)
    some = {}
    for pair in drawn:
        if not seen.issuperset(pair.split()):
            seen.update(pair.split())
            some[pair] = recorded[pair]
    return some


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"adapter": "lora", "strategy": "fsdp"}, None),
        ({"quantization": "bnb_nf4", "strategy": "zero3"}, "Set strategy=fsdp, or quantization=none."),
        ({"adapter": "loftq", "quantization": "none"}, "Set quantization=bnb_nf4, or adapter=lora."),
    ],
)
def test_a_pair_is_what_the_rules_say_of_it(choice: dict[str, str], said: str | None) -> None:
    refusal = support.refusal(choice)
    assert refusal is None if said is None else refusal is not None and refusal.endswith(said)


def test_every_checkpoint_by_name_is_nothing_but_its_hub_id() -> None:
    assert set(models.checkpoints()) | models.UNNAMED == set(options("model"))
    for name, path in models.checkpoints().items():
        option = yaml.safe_load((models.CONF / f"{name}.yaml").read_text())
        assert option == {"defaults": ["_base"], "path": path} and path.count("/") == 1


def test_no_two_names_are_the_same_checkpoint() -> None:
    paths = list(models.checkpoints().values())
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize(
    ("name", "model_type"), [("qwen3_8b", "qwen3"), ("qwen3_moe_30b", "qwen3_moe"), ("deepseek_r1_distill_qwen_7b", "qwen2")]
)
def test_the_longest_start_of_a_name_says_its_architecture(name: str, model_type: str) -> None:
    assert models.architecture(name) == model_type


def test_every_architecture_by_name_has_a_checkpoint() -> None:
    named = {models.architecture(name) for name in models.checkpoints()}
    assert named == set(models.ARCHITECTURES.values())
