"""docs/support.md: which options go together, by the rules that a run is checked by and by the runs of tests/pages/smoke.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from raytune_llm.config.load import compose, validate
from raytune_llm.config.options import options
from raytune_llm.config.run import RUNS, TrainRun
from raytune_llm.errors import ConfigError

RAN, RAN_ON_GPU, FAULT = "ran", "ran on a GPU", "fault"
MARKS = {RAN: RAN, RAN_ON_GPU: "ran, GPU"}
CPU, GPU = "versions", "versions_on_gpu"
"""What the record has beside the pairs."""
NEEDS_GPU = re.compile("needs a .*GPU")
MODELS = {
    "dense": ["model=tiny_random"],
    "mixture": [
        "model=tiny_random",
        "model.config={model_type:qwen3_moe,hidden_size:64,intermediate_size:128,num_hidden_layers:2,num_attention_heads:4,"
        "num_key_value_heads:2,moe_intermediate_size:32,num_experts:4,num_experts_per_tok:2}",
    ],
    "hybrid": [
        "model=tiny_random",
        "model.config={model_type:lfm2,hidden_size:64,intermediate_size:128,num_hidden_layers:2,num_attention_heads:4,"
        "num_key_value_heads:2,layer_types:[conv,full_attention]}",
    ],
    "multimodal": ["model=hub", "model.path=multimodal", "model.tokenizer=bytes"],
}
"""Kinds of model, and what makes a small one: a Llama, a Qwen3 with four experts, an LFM2 with a convolution, whose rows have a
line each, and a Gemma 3 with its tower."""
AXES = {axis: options(axis) for axis in ("adapter", "quantization", "optimizer", "strategy", "stage")} | {"model": list(MODELS)}
REST = {"adapter": "lora", "quantization": "none", "optimizer": "adamw", "strategy": "ddp", "stage": "sft", "model": "dense"}
"""What the other axes are while two are crossed."""
NEEDS: dict[str, dict[str, list[str]]] = {
    "loftq": {"quantization": ["quantization=bnb_nf4"]},
    "schedule_free": {"schedule": ["schedule=constant"]},
    "kto": {"data": ["data=command_verdicts"]},
    "pretrain": {"data": ["data=diary"]},
    **{stage: {"data": ["data=command_pairs"]} for stage in ("cpo", "dpo", "orpo", "reward", "simpo")},
}
"""What an option can't be without: a row of a stage has its form."""
SET: dict[str, tuple[str, ...]] = dict.fromkeys(("adalomo", "lomo"), ("train.max_grad_norm=null",))
"""Likewise, settings: tensors that step one by one are not clipped."""
SMALL = [
    "data=commands", "resources=local", "tracking=none", "checkpoint.every_steps=null",
    "data.max_length=512", "train.precision=fp32", "train.max_steps=2", "train.global_batch_size=2", "train.log_every_steps=1",
]  # fmt: skip
HEAD = """\
# Supported combinations

This page has every pair of options of `adapter`, `quantization`, `optimizer`, `strategy` and `stage`, and each of these options
with each kind of model. A pair that the config's rules accept was trained for two steps and saved
({versions}).
`ran` means that this worked. A number refers to the reason below the table why the pair is refused, with the fix (or to a fault,
which is marked as one). `ran, GPU` means that the pair needs a GPU, and ran on one ({gpu}).
`GPU` means that it needs a GPU and was not run. Strategies other than `ddp` ran with two workers. All other options are LoRA, no
quantization, AdamW, `ddp`, `sft` and a small Llama, except that some options need others (`loftq` a quantized base, `lomo` and
`adalomo` no clipping).

Kinds of model: `dense` is a Llama; `mixture` is a Qwen3 with experts; `hybrid` is an LFM2, which needs `data.packing=false`;
`multimodal` is a Gemma 3 without its vision tower. [models.md](models.md) has all families.

`python -m tests.pages.smoke` runs pairs that were not run yet, and `python -m tests.pages` writes this page. A test keeps rules,
runs and page consistent, and another test runs a sample of the pairs again.
"""


def page() -> str:
    found = recorded()
    tables = {pair: cells(*pair, found["pairs"]) for pair in combinations(AXES, 2)}
    free = [pair for pair, cell in tables.items() if set(cell.values()) <= {RAN, RAN_ON_GPU}]
    lines = [f"- Every `{rows}=` ran with every `{columns}=`." for rows, columns in free]
    shown = (table(*pair, cell) for pair, cell in tables.items() if pair not in free)
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    gpu = ", ".join([found[GPU]["device"], *(f"{name} {found[GPU][name]}" for name in ("torch", "transformers", "peft"))])
    return "\n".join([HEAD.format(versions=versions, gpu=gpu), *lines, *([""] if lines else []), *shown])


def recorded() -> dict[str, Any]:
    """What the runs of smoke.py ended as."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("support.json").read_text(encoding="utf-8"))
    return found


def name(choice: Mapping[str, str]) -> str:
    return " ".join(f"{axis}={option}" for axis, option in choice.items())


@cache
def pairs() -> dict[str, tuple[dict[str, str], str | None]]:
    """By name: what it chooses, and why a rule of the config refuses it."""
    choices = [
        {rows: row, columns: column}
        for rows, columns in combinations(AXES, 2)
        for row, column in product(AXES[rows], AXES[columns])
    ]
    return {name(choice): (choice, refusal(choice)) for choice in choices}


def accepted() -> dict[str, dict[str, str]]:
    """The pairs that no rule of the config refuses."""
    return {pair: choice for pair, (choice, refused) in pairs().items() if refused is None}


def cells(rows: str, columns: str, ran: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Why two options don't go together, or that they did."""
    named = {pair: name({rows: pair[0], columns: pair[1]}) for pair in product(AXES[rows], AXES[columns])}
    return {pair: pairs()[one][1] or ran[one] for pair, one in named.items()}


def table(rows: str, columns: str, found: Mapping[tuple[str, str], str]) -> str:
    """In Markdown, with the refusals under it."""
    refusals = dict.fromkeys(said for said in found.values() if said not in MARKS)
    of_devices = {said: "GPU" for said in refusals if NEEDS_GPU.search(said)}
    numbered = (said for said in refusals if said not in of_devices)
    marks = {**MARKS, **of_devices, **{said: str(number) for number, said in enumerate(numbered, 1)}}
    lines = [f"## `{rows}=` with `{columns}=`", "", f"| | {' | '.join(f'`{column}`' for column in AXES[columns])} |"]
    lines += ["|---" * (len(AXES[columns]) + 1) + "|"]
    lines += [f"| `{row}` | {' | '.join(marks[found[row, column]] for column in AXES[columns])} |" for row in AXES[rows]]
    return "\n".join([*lines, "", *_legend(marks), ""])


def _legend(marks: Mapping[str, str]) -> Iterable[str]:
    return (f"- GPU: {said}" if mark == "GPU" else f"{mark}. {said}" for said, mark in marks.items() if said not in MARKS)


def refusal(choice: Mapping[str, str]) -> str | None:
    """The reason and the fix, where a rule of the config refuses it."""
    try:
        run_of(choice)
    except ConfigError as error:
        return sentence(error)
    return None


def sentence(error: ConfigError) -> str:
    """Why, and the fix, without what the choice says itself."""
    reason = error.rule.partition(": ")[2]
    said = f"{reason[0].upper()}{reason[1:]}" if reason else f"`{error.setting}` {error.rule}"
    return f"{said}. {error.fix}".rstrip()


def run_of(choice: Mapping[str, str]) -> TrainRun:
    """Raises ConfigError where a rule refuses it. The model of `multimodal` is nowhere yet."""
    needed = {group: words for chosen in choice.values() for group, words in NEEDS.get(chosen, {}).items()}
    words = {axis: words_of(axis, option) for axis, option in (REST | choice).items()}
    sections = {
        group: _section(group, *chosen) for group, chosen in (words | needed | {axis: words[axis] for axis in choice}).items()
    }
    settings = [setting for chosen in choice.values() for setting in SET.get(chosen, ())]
    if sections["strategy"]["name"] == "ddp":
        sections["resources"] = _section("resources", "resources=inline")
        settings += ["train.micro_batch_size=2"] if settings else []  # and have one micro-batch a step
    if choice.get("model") == "hybrid":
        sections["data"] = sections.get("data", _whole()["data"]) | {"packing": False}
    run: TrainRun = validate(RUNS["train"], _whole(*settings) | sections)
    return run


def words_of(axis: str, option: str) -> list[str]:
    return MODELS[option] if axis == "model" else [f"{axis}={option}"]


@cache
def _whole(*settings: str) -> dict[str, Any]:
    return _composed(*settings)


@cache
def _section(group: str, *words: str) -> Any:
    return _composed(*words)[group]


def _composed(*overrides: str) -> dict[str, Any]:
    composed = compose("train", [*SMALL, *overrides])
    settings = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    whole: Any = OmegaConf.to_container(settings, resolve=True)
    return whole
