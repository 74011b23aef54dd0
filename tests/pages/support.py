"""docs/support.md: which options go together, found by the rules that a run is checked by."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations
from typing import Any

from omegaconf import OmegaConf

from raytune_llm.config.load import compose, validate
from raytune_llm.config.options import options
from raytune_llm.config.run import RUNS
from raytune_llm.errors import ConfigError

AXES = {axis: options(axis) for axis in ("adapter", "quantization", "optimizer", "strategy", "stage")}
REST = {"adapter": "lora", "quantization": "none", "optimizer": "adamw", "strategy": "ddp", "stage": "sft"}
"""What the other axes are while two are crossed."""
NEEDS = {"loftq": {"quantization": "bnb_nf4"}, "schedule_free": {"schedule": "constant"}, "kto": {"data": "chat_labeled"}}
NEEDS |= {stage: {"data": "chat_pairs"} for stage in ("cpo", "dpo", "orpo", "reward", "simpo")} | {"pretrain": {"data": "text"}}
"""What an option can't be without: a row of a stage has its form."""
SET: dict[str, tuple[str, ...]] = dict.fromkeys(("adalomo", "lomo"), ("train.max_grad_norm=null", "train.micro_batch_size=8"))
"""Likewise, settings: tensors that step one by one are not clipped, and steps have one micro-batch."""
HEAD = """\
# What goes with what

Every pair of options of `adapter`, `quantization`, `optimizer`, `strategy` and `stage` is asked of the rules that a run is
checked by before anything is loaded: `yes` is a pair that they let through, a number is a refusal, which stands under the table
with the fix. The rest is LoRA, unquantized, AdamW, `ddp` and `sft`, and for an option what it needs (`loftq` a quantized base,
`lomo` and `adalomo` no clipping).
What depends on more is refused by name as well: on the model ([models.md](models.md)) and on the device (`fp8` needs a GPU from
Hopper on).

`python -m tests.pages` makes this page.
"""


def page() -> str:
    tables = {pair: cells(*pair) for pair in combinations(AXES, 2)}
    free = [pair for pair, found in tables.items() if not any(found.values())]
    lines = [f"- Every `{rows}=` goes with every `{columns}=`." for rows, columns in free]
    shown = (table(*pair, found) for pair, found in tables.items() if pair not in free)
    return "\n".join([HEAD, *lines, "", *shown])


def cells(rows: str, columns: str) -> dict[tuple[str, str], str | None]:
    """Why two options don't go together, if they don't."""
    return {(row, column): refusal({rows: row, columns: column}) for row in AXES[rows] for column in AXES[columns]}


def table(rows: str, columns: str, found: Mapping[tuple[str, str], str | None]) -> str:
    """In Markdown, with the refusals under it."""
    numbers = {said: number for number, said in enumerate(dict.fromkeys(filter(None, found.values())), 1)}
    shown = {pair: "yes" if said is None else str(numbers[said]) for pair, said in found.items()}
    lines = [f"## `{rows}=` with `{columns}=`", ""]
    lines += [f"| | {' | '.join(f'`{column}`' for column in AXES[columns])} |", "|---" * (len(AXES[columns]) + 1) + "|"]
    lines += [f"| `{row}` | {' | '.join(shown[row, column] for column in AXES[columns])} |" for row in AXES[rows]]
    return "\n".join([*lines, "", *(f"{number}. {said}" for said, number in numbers.items()), ""])


def refusal(choice: Mapping[str, str]) -> str | None:
    """The reason and the fix."""
    needed = {group: option for chosen in choice.values() for group, option in NEEDS.get(chosen, {}).items()}
    sections = {group: _section(group, option) for group, option in {**REST, **needed, **choice}.items()}
    settings = [setting for chosen in choice.values() for setting in SET.get(chosen, ())]
    try:
        validate(RUNS["train"], _whole(*settings) | sections)
    except ConfigError as error:
        reason = error.rule.partition(": ")[2] or f"{error.setting} {error.rule}"
        return f"{reason[0].upper()}{reason[1:]}. {error.fix}".rstrip()
    return None


@cache
def _whole(*settings: str) -> dict[str, Any]:
    return _composed(*settings)


@cache
def _section(group: str, option: str) -> Any:
    return _composed(f"{group}={option}")[group]


def _composed(*overrides: str) -> dict[str, Any]:
    composed = compose("train", ["data.path=rows.jsonl", *overrides])
    settings = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    whole: Any = OmegaConf.to_container(settings, resolve=True)
    return whole
