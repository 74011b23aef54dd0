"""Translates errors of Hydra and pydantic to ConfigErrors with the setting, the rule, the value and, if a name is misspelled, a
suggestion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_llm.config.options import groups, listed, options
from raytune_llm.config.override_syntax import quoted
from raytune_llm.config.overrides import CONF
from raytune_llm.config.plain import as_text, flat_keys, read_yaml
from raytune_llm.config.run import RUNS
from raytune_llm.errors import ConfigError, first_line

UNEXPECTED = ("unexpected_keyword_argument", "extra_forbidden")
"""pydantic's error types for an unknown setting."""
NEAR = 0.8
"""Minimum similarity (0 to 1, difflib's ratio) between a misspelled name and a suggestion, so that foo does not suggest floor."""
KINDS_OF_VALUES = {"list": ("must be a list", "Say, [a,b]."), "dict": ("must be an object", "Say, {a: 1}.")}
"""OmegaConf's name of the kind of a setting's value -> the rule and the example for a value of another kind."""
RENAMED = {"quantization.wide": "quantization.skip_modules"}
"""The former name of a setting -> its name now."""


def from_hydra(
    error: Exception,
    config_name: str,
    overrides: list[str],
    config_dir: str | Path | None,
    known_keys: Callable[[], list[str]],
) -> ConfigError:
    """The ConfigError for an error of Hydra. known_keys: the settings under the chosen options, to suggest from."""
    text = str(error)
    if match := re.search(r"[Cc]ould not override '([^']+)'", text):
        return _unknown_key(match[1], known_keys(), _verb_of(config_name))
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        found = options(group, config_dir)
        started = [one for one in found if one.startswith(f"{option}_")]
        near = started or difflib.get_close_matches(option, found, n=1)
        fix = f"Did you mean {group}={' or '.join(near)}?" if near else f"There are: {listed(found, ', ')}."
        return ConfigError(f"{group}", "must be one of its options", got=option, fix=fix)
    if match := re.search(r"Cannot find primary config '([^']+)'", text):
        return ConfigError("--config-name", f"must be a YAML file of {config_dir or CONF}", got=match[1])
    if match := re.search(r"Key '([^']+)' is not in struct|Key '([^']+)' not in", text):
        key = getattr(error, "full_key", None) or match[1] or match[2]
        return _unknown_key(key, known_keys(), _verb_of(config_name))
    if (
        "LexerNoViableAlt" in text
        or "mismatched input" in text
        or "Error parsing override" in text
        or "no viable alternative" in text
        or "token recognition" in text
    ):
        match = re.search(r"Error parsing override '([^']*)'", text)
        got = match[1] if match else " ".join(overrides)
        return ConfigError(
            "an override", "must read key=value", got=got, fix="Quote values with spaces or brackets: 'key=[a,b]'."
        )
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.*)'", text):
        fix = f'Add -m for a run of each, or write "{match[1]}={quoted(match[2])}" where it is one.'
        return ConfigError(match[1], "has several values", got=match[2], fix=fix)
    if match := re.search(r"Multiple values for (\S+?)[.\s]", text):
        return ConfigError(match[1], "was chosen twice", fix="Choose it once.")
    if match := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return ConfigError(match[1], "exists already", fix=f"Write {match[1]}=... without the plus sign.")
    if match := re.search(r"Could not delete from config. The value of '([^']+)' is", text):
        return ConfigError(match[1], "is removed by its name alone", fix=f"Write ~{match[1]}.")
    if match := re.search(r"Override (\S+?)@(\S*?)=.*looks like a config group override", text, re.DOTALL):
        fix = f"Write {match[1]}=... without the @."
        return ConfigError(match[1], "is no group of options, which alone can have an @", got=f"{match[1]}@{match[2]}", fix=fix)
    if match := re.search(r"Could not delete from config. '([^']+)'", text):
        return ConfigError(match[1], "can't be removed: it is not in the config", fix="Leave it out.")
    if match := re.search(r"Error merging override (?:\+\+)?([\w.]+)=(.*?)\.?(?:\n|$)", text):
        kind = re.search(r"object_type=(list|dict)", str(error.__cause__))
        if kind is not None:
            rule, fix = KINDS_OF_VALUES[kind[1]]
            return ConfigError(match[1], rule, got=match[2], fix=fix)
        return ConfigError(match[1], "can't have this value", got=match[2], fix="`--cfg job` shows its current value.")
    return ConfigError("the config", f"can't be composed: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What is wrong, from Hydra's message, whose first line says where and whose second line says what."""
    where, _, what = str(error).strip().partition("\n")
    return f"{where} {what.strip().partition(chr(10))[0]}".rstrip(" .") if where.endswith(":") else first_line(error)


def _verb_of(config_name: str) -> str:
    return config_name if config_name in RUNS else "train"


def _unknown_key(key: str, known: list[str], verb: str = "train") -> ConfigError:
    if key in RENAMED:
        return ConfigError(key, f"has another name now, {RENAMED[key]}", fix=f"Write {RENAMED[key]}=...")
    if key == "experiment":
        fix = "Let the file begin with the line `# @package _global_`, and with `key: value` lines below it."
        return ConfigError("+experiment", "must be a file of settings for the whole run", fix=fix)
    if elsewhere := _options_with(key):
        group, chosen = key.partition(".")[0], ", ".join(elsewhere)
        return ConfigError(key, f"is no setting of the {group} that is chosen", fix=f"It is one of {chosen}.")
    known = [name for name in known if name != key and not name.startswith((f"{key}.", "hydra"))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR) or _same_last_part(key, known)
    if near:
        return ConfigError(key, "is no setting", fix=f"Did you mean {near[0]}?")
    shows = f"`python -m raytune_llm {verb} --cfg job` shows every setting."
    first = key.partition(".")[0]
    others = [other for other in RUNS if other != verb and first in read_yaml(CONF / f"{other}.yaml", setting=other)]
    if others:
        return ConfigError(key, f"is no setting of {verb}, but of {listed(others, ', ')}", fix=f"Leave it out; {shows}")
    return ConfigError(key, "is no setting", fix=shows)


def _options_with(key: str) -> list[str]:
    """group=option of each option that has this setting."""
    group, _, name = key.partition(".")
    if not name or group not in groups():
        return []
    return [f"{group}={option}" for option in options(group) if name in read_yaml(CONF / group / f"{option}.yaml", setting=group)]


def _same_last_part(key: str, known: list[str]) -> list[str]:
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=NEAR)
    return [last[name] for name in near]


def from_pydantic(error: ValidationError, values: dict[str, Any]) -> ConfigError:
    """The ConfigError for the first of pydantic's errors. Unknown settings are reported together."""
    complaints: list[Any] = error.errors(include_url=False)
    first: dict[str, Any] = complaints[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    setting, fix = _path(first, values), ""
    match first["type"]:
        case "missing":
            choice = f" to one of {listed(options(setting), ', ')}" if setting in groups() else ""
            return ConfigError(setting, "must be given", fix=f"Set {setting}{choice}, and leave ~{setting} out.")
        case kind if kind in UNEXPECTED:
            unexpected = [_path(complaint, values) for complaint in complaints if complaint["type"] in UNEXPECTED]
            return _of_other_options(unexpected, values) or _unknown_key(setting, list(flat_keys(values)))
        case "string_type" if isinstance(first["input"], int | float) and not setting.rpartition(".")[2].isdigit():
            fix = f"Quote it twice: \"{setting}='{as_text(first['input'])}'\"."
        case "literal_error":
            known = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            near = difflib.get_close_matches(str(first["input"]), known, n=1)
            fix = f"Did you mean {near[0]}?" if near else ""
        case "union_tag_not_found":
            there = ", ".join(options(setting)) if setting in groups() else ""
            return ConfigError(setting, "must be one of its options", got="none", fix=f"There are: {there}." if there else "")
        case "union_tag_invalid":
            expected = first["ctx"]["expected_tags"].replace("'", "")
            return ConfigError(f"{setting}.name", f"must be one of {expected}", got=first["ctx"]["tag"])
    ways = [_rule(one) for one in complaints if _path(one, values) == setting and one["type"] not in UNEXPECTED]
    if len(dict.fromkeys(ways)) > 1:
        return ConfigError(setting, "must be " + " or ".join(dict.fromkeys(ways)), got=first["input"], fix=fix)
    lengths = first["type"] in ("too_short", "too_long")
    rule = f"must be {_rule(first)}" if lengths else _in_words(first["msg"].replace("Input should be", "must be"))
    rule = re.sub(r"must be a valid (\w+)", lambda m: f"must be {_article(m[1])}", rule)
    return ConfigError(setting, rule, got=first["input"], fix=fix)


def _of_other_options(keys: Sequence[str], values: Mapping[str, Any]) -> ConfigError | None:
    """The error if the chosen option lacks the setting keys[0] but other options of its group have it. Other such keys of the
    group are reported with it, since one experiment may have set all of them. None if no option has it."""
    group = keys[0].partition(".")[0]
    settings = {f"{group}={option}": read_yaml(CONF / group / f"{option}.yaml", setting=group) for option in options(group)}
    owners = {key: [option for option, own in settings.items() if key.partition(".")[2] in own] for key in keys}
    found = [key for key in keys if key.startswith(f"{group}.") and owners[key]]
    if keys[0] not in found or "name" not in values[group]:
        return None
    chosen, others = f"{group}={values[group]['name']}", ", ".join(sorted({option for key in found for option in owners[key]}))
    if len(found) == 1:
        fix = f"It is one of {others}. Where an experiment sets it, add ~{keys[0]}."
        return ConfigError(keys[0], f"is no setting of {chosen}", got=values[group][keys[0].partition(".")[2]], fix=fix)
    fix = f"They are of {others}. Where an experiment sets them, add {' '.join(f'~{key}' for key in found)}."
    return ConfigError(f"{', '.join(found[:-1])} and {found[-1]}", f"are no settings of {chosen}", fix=fix)


def _rule(complaint: Mapping[str, Any]) -> str:
    """The rule that a pydantic error states, without "must be"."""
    match complaint["type"]:
        case "literal_error":
            return complaint["ctx"]["expected"].replace("'", "")
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "list_type":
            return "a list ([a,b])"
        case "dict_type" | "dataclass_type":
            return "an object"
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "string_type":
            return "text"
        case "none_required":
            return "null"
        case "too_short":
            return f"a list of at least {complaint['ctx']['min_length']}"
        case "too_long":
            return f"a list of at most {complaint['ctx']['max_length']}"
    return _in_words(complaint["msg"].removeprefix("Input should be "))


def _in_words(rule: str) -> str:
    rule = rule.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return rule.replace("less than", "below").replace("greater than", "above")


def _path(complaint: Mapping[str, Any], values: Any) -> str:
    """The dotted path of the setting that a pydantic error is about."""
    path: list[str] = []
    node, places = values, complaint["loc"]
    for part in places:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]
        elif complaint["type"] not in {"missing", *UNEXPECTED} or part != places[-1]:
            continue  # the tag of a union, not a key
        path.append(str(part))
    return ".".join(path)


def _article(noun: str) -> str:
    noun = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "array": "list"}.get(
        noun, noun
    )
    return noun if noun in ("text", "true or false") else f"a {noun}"
