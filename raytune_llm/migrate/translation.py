"""A training file of LLaMA-Factory -> settings of ours, and what became of every argument in it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raytune_llm.migrate.argument_rules import Becomes, Joined, NoEffect, PartOf, Refusal, Refused, Settings
from raytune_llm.migrate.arguments import ARGUMENTS, FORMER, NULL_SAYS_SOMETHING
from raytune_llm.migrate.rules.values import Find

Rule = Callable[..., Settings | NoEffect]
Result = Settings | NoEffect | Refusal | PartOf
"""PartOf: of an argument that is refused."""


DEFAULTS = {name: None if isinstance(rule, NoEffect | PartOf) else rule.default for name, rule in ARGUMENTS.items()}


@dataclass(frozen=True)
class ArgumentOutcome:
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
    outcomes: tuple[ArgumentOutcome, ...]
    """Outcomes of the file's arguments, in its order, and of missing ones."""

    @property
    def refused(self) -> tuple[ArgumentOutcome, ...]:
        """The refused arguments, without those that are only refused because of another one."""
        return tuple(outcome for outcome in self.of("refused") if outcome.refused_with is None)

    def of(self, kind: str) -> tuple[ArgumentOutcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.kind == kind)


def translate(given: Mapping[str, Any], *, world_size: int | None, dataset_info: str | None, find: Find) -> Translation:
    """Every argument as a setting, as nothing, or as a refusal with its reason. See rules/ for what is not in the file."""
    current = {FORMER.get(name, name): value for name, value in given.items()}
    rules = {name: rule for name, value in current.items() if (rule := _type_rule(DEFAULTS.get(name), value))}
    mistyped = {name: Refusal(f"{rule}, got {current[name]!r}") for name, rule in rules.items()}
    said = {name for name, value in current.items() if value is not None or name in NULL_SAYS_SOMETHING}
    values = {**DEFAULTS, **{name: current[name] for name in said - mistyped.keys()}}
    values |= {"world_size": world_size, "dataset_info": dataset_info, "find": find}
    applied: dict[Rule, Result] = {}
    results = {name: _result(name, values, applied) for name in {**ARGUMENTS, **current}} | mistyped
    reasons = {result.argument or name: result.why for name, result in results.items() if isinstance(result, Refusal)}
    settings = {path: value for result in results.values() if isinstance(result, dict) for path, value in result.items()}
    outcomes = [_outcome(name, value, results[name], reasons) for name, value in current.items()]
    # What is refused and stands nowhere in the file: an argument that it needs, or a setting of the import (dataset_info).
    outcomes += [ArgumentOutcome(name, None, "refused", why) for name, why in reasons.items() if name not in current]
    return Translation(settings, tuple(outcomes))


def _type_rule(default: Any, value: Any) -> str | None:
    """The rule that the value breaks, if it has not the default's type; else None. A text can also be a list: all, or
    [q_proj, v_proj]."""
    types: tuple[tuple[type | tuple[type, ...], type | tuple[type, ...], str], ...] = (
        (bool, bool, "must be true or false"),
        ((int, float), (int, float), "must be a number"),
        (str, (str, list), "must be text"),
    )
    for kind, fitting, rule in types:
        if isinstance(default, kind):
            fits = isinstance(value, fitting) and isinstance(value, bool) == isinstance(default, bool)
            return None if value is None or fits else rule
    return None


def _outcome(name: str, value: Any, result: Result, reasons: Mapping[str, str]) -> ArgumentOutcome:
    if name in reasons:
        return ArgumentOutcome(name, value, "refused", reasons[name])
    match result:
        case Refusal(argument=blamed):
            return ArgumentOutcome(name, value, "refused", f"goes with {blamed}", refused_with=blamed)
        case PartOf(switch):
            return ArgumentOutcome(name, value, "refused", f"goes with {switch}", refused_with=switch)
        case NoEffect(why):
            return ArgumentOutcome(name, value, "no effect", why)
        case _:
            return ArgumentOutcome(name, value, "mapped", " ".join(f"{path}={_shown(value)}" for path, value in result.items()))


def _result(name: str, values: Mapping[str, Any], applied: dict[Rule, Result]) -> Result:
    value = values.get(name)
    match ARGUMENTS.get(name):
        case None:
            near = difflib.get_close_matches(name, ARGUMENTS, n=1)
            return Refusal("is no argument of LLaMA-Factory 0.9.5" + (f" (did you mean {near[0]}?)" if near else ""))
        case NoEffect() as rule:
            return rule
        case Refused(default, why):
            wanted = value is not None and value != default and (value is not False or default is True)
            return Refusal(why) if wanted else NoEffect("is not asked for")
        case PartOf(switch, on) as rule:
            if values[switch] if on is None else values[switch] == on:
                return rule
            return NoEffect(f"is read with {switch}{'' if on is None else f'={on}'} only")
        case Becomes(_, setting, read):
            return _apply(lambda: {setting: read(value)}, values)
        case Joined(_, join):
            if join not in applied:
                applied[join] = _apply(join, values)
            return applied[join]


def _apply(rule: Rule, values: Mapping[str, Any]) -> Result:
    taken = {parameter: values[parameter] for parameter in inspect.signature(rule).parameters}
    try:
        return rule(**taken)
    except Refusal as refusal:
        return refusal
    except (TypeError, ValueError, AttributeError) as error:
        # Only what has no default to compare its type with comes here.
        untyped = (name for name, value in taken.items() if value is not None and DEFAULTS.get(name, value) is None)
        return Refusal(f"can't be read ({error})", next(untyped, None))


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
