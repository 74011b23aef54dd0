"""A training file of LLaMA-Factory -> settings of ours, and what became of every argument in it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raytune_llm.migrate.arguments import ARGUMENTS, FORMER
from raytune_llm.migrate.fates import Becomes, Joined, NoEffect, PartOf, Refusal, Refused, Settings
from raytune_llm.migrate.rules import Find

Rule = Callable[..., Settings | NoEffect]


@dataclass(frozen=True)
class Outcome:
    """What became of one argument."""

    argument: str
    value: Any
    kind: Literal["mapped", "no effect", "refused"]
    text: str
    """The settings that it became, or why it has no effect or is refused."""


@dataclass(frozen=True)
class Translation:
    settings: Settings
    outcomes: tuple[Outcome, ...]
    """Of the arguments in the file, in its order, and of what is missing in it."""

    @property
    def refused(self) -> tuple[Outcome, ...]:
        return self.of("refused")

    def of(self, kind: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.kind == kind)


def translate(given: Mapping[str, Any], *, world_size: int | None, dataset_info: str | None, find: Find) -> Translation:
    """Every argument as a setting, as nothing, or as a refusal with its reason. See rules.py for what is not in the file."""
    current = {FORMER.get(name, name): value for name, value in given.items()}
    defaults = {name: fate.default for name, fate in ARGUMENTS.items() if not isinstance(fate, NoEffect | PartOf)}
    values = {**defaults, **current, "world_size": world_size, "dataset_info": dataset_info, "find": find}
    settings: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}
    applied: dict[Rule, Settings | NoEffect | Refusal] = {}
    for name in (*ARGUMENTS, *(name for name in current if name not in ARGUMENTS)):
        result = _result(name, values, applied)
        if isinstance(result, Refusal):
            blamed = result.argument or name
            if blamed == name or (blamed not in current and blamed not in outcomes):
                outcomes[blamed] = Outcome(blamed, values.get(blamed), "refused", result.why)
            elif name in current:
                outcomes[name] = Outcome(name, values[name], "refused", f"goes with {blamed}")
        elif isinstance(result, NoEffect):
            outcomes[name] = Outcome(name, values.get(name), "no effect", result.why)
        else:
            settings |= result
            shown = " ".join(f"{setting}={_shown(value)}" for setting, value in result.items())
            outcomes[name] = Outcome(name, values[name], "mapped", shown)
    missing = [name for name, outcome in outcomes.items() if outcome.kind == "refused" and name not in current]
    return Translation(settings, tuple(outcomes[name] for name in (*current, *missing)))


def _result(name: str, values: Mapping[str, Any], applied: dict[Rule, Any]) -> Settings | NoEffect | Refusal:
    value = values.get(name)
    match ARGUMENTS.get(name):
        case None:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            return Refusal("is no argument of LLaMA-Factory 0.9.5" + (f"; did you mean {near[0]}?" if near else ""))
        case NoEffect() as fate:
            return fate
        case Refused(default, why):
            wanted = value not in (default, None, False)
            return Refusal(why) if wanted else NoEffect("is not asked for")
        case PartOf(switch, on):
            if values[switch] == on:
                return Refusal(f"goes with {switch}", switch)
            return NoEffect(f"is read with {switch}{'' if on is True else f'={on}'} alone")
        case Becomes(_, setting, read):
            try:
                return {setting: read(value)}
            except Refusal as refusal:
                return refusal
        case Joined(_, rule):
            if rule not in applied:
                applied[rule] = _apply(rule, values)
            return applied[rule]


def _apply(rule: Rule, values: Mapping[str, Any]) -> Settings | NoEffect | Refusal:
    try:
        return rule(**{parameter: values[parameter] for parameter in inspect.signature(rule).parameters})
    except Refusal as refusal:
        return refusal


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
