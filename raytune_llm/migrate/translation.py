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
Result = Settings | NoEffect | Refusal | PartOf
"""PartOf: of an argument that is refused."""


@dataclass(frozen=True)
class Outcome:
    """What became of one argument."""

    argument: str
    value: Any
    kind: Literal["mapped", "no effect", "refused"]
    text: str
    """The settings that it became, or why it has no effect or is refused."""
    refused_with: str | None = None
    """The argument for whose sake this one is refused."""


@dataclass(frozen=True)
class Translation:
    settings: Settings
    outcomes: tuple[Outcome, ...]
    """Of the arguments in the file, in its order, and of what is missing in it."""

    @property
    def refused(self) -> tuple[Outcome, ...]:
        """What there is to mend, without what is refused for the sake of another."""
        return tuple(outcome for outcome in self.of("refused") if outcome.refused_with is None)

    def of(self, kind: str) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.kind == kind)


def translate(given: Mapping[str, Any], *, world_size: int | None, dataset_info: str | None, find: Find) -> Translation:
    """Every argument as a setting, as nothing, or as a refusal with its reason. See rules.py for what is not in the file."""
    current = {FORMER.get(name, name): value for name, value in given.items()}
    defaults = {name: fate.default for name, fate in ARGUMENTS.items() if not isinstance(fate, NoEffect | PartOf)}
    values = {**defaults, **current, "world_size": world_size, "dataset_info": dataset_info, "find": find}
    applied: dict[Rule, Result] = {}
    results = {name: _result(name, values, applied) for name in {**ARGUMENTS, **current}}
    reasons = {result.argument or name: result.why for name, result in results.items() if isinstance(result, Refusal)}
    settings = {path: value for result in results.values() if isinstance(result, dict) for path, value in result.items()}
    missing = [name for name in reasons if name not in current]
    outcomes = (_outcome(name, values.get(name), results[name], reasons) for name in (*current, *missing))
    return Translation(settings, tuple(outcomes))


def _outcome(name: str, value: Any, result: Result, reasons: Mapping[str, str]) -> Outcome:
    if name in reasons:
        return Outcome(name, value, "refused", reasons[name])
    match result:
        case Refusal(argument=blamed):
            return Outcome(name, value, "refused", f"goes with {blamed}", refused_with=blamed)
        case PartOf(switch):
            return Outcome(name, value, "refused", f"goes with {switch}", refused_with=switch)
        case NoEffect(why):
            return Outcome(name, value, "no effect", why)
        case _:
            return Outcome(name, value, "mapped", " ".join(f"{path}={_shown(value)}" for path, value in result.items()))


def _result(name: str, values: Mapping[str, Any], applied: dict[Rule, Result]) -> Result:
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
        case PartOf(switch, on) as fate:
            if values[switch] if on is None else values[switch] == on:
                return fate
            return NoEffect(f"is read with {switch}{'' if on is None else f'={on}'} alone")
        case Becomes(_, setting, read):
            try:
                return {setting: read(value)}
            except Refusal as refusal:
                return refusal
        case Joined(_, rule):
            if rule not in applied:
                applied[rule] = _apply(rule, values)
            return applied[rule]


def _apply(rule: Rule, values: Mapping[str, Any]) -> Result:
    try:
        return rule(**{parameter: values[parameter] for parameter in inspect.signature(rule).parameters})
    except Refusal as refusal:
        return refusal


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
