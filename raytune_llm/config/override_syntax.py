"""Converts words of the command line (key=value) between what a user types and what Hydra's grammar accepts."""

from __future__ import annotations

import math
import random
import re
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString, RangeSweep, Sweep
from hydra.errors import HydraException
from yaml import YAMLError

from raytune_llm.config.options import options
from raytune_llm.config.plain import as_text, typed_object
from raytune_llm.config.space import Choice, Interval, Values, check_length
from raytune_llm.errors import NOT_YAML, ConfigError

SEVERAL = r"(choice|range|interval|tag|glob|sort|shuffle|int|float|str|bool)\("
"""Hydra's functions with which a value that stands for several begins."""


def quoted(text: str) -> str:
    """The text quoted for Hydra's grammar, in which a backslash is an escape only before a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}{escaped[len(escaped.rstrip(chr(92))) :]}'"


def as_typed(override: str, *, several: bool = False) -> str:
    """The override as Hydra can read it. Values that Hydra's grammar can't parse are quoted: ~/rows.jsonl, données.jsonl,
    train[:10], a (1).jsonl. Lists and objects that it can't parse are read as YAML.

    several: commas separate values, as with -m. Raises ConfigError.
    """
    if not override.isprintable():
        _check_encoding(override)
    if is_read(override):
        return override
    found = re.fullmatch(r"([+~]*[^=\s]+)=(.*)", override, re.DOTALL)
    if found is None or not is_read(f"{found[1]}=1"):
        raise ConfigError("an override", "must read key=value", got=override, fix="See --help for the settings.")
    key, value = found[1], found[2].strip()
    if _is_open(value):
        fix = "Close the quote." if value.startswith(("'", '"')) else f"For example, '{key}=[a,b]'."
        raise ConfigError(key, "has a quote or a bracket that is not closed", got=value, fix=fix)
    if value.startswith(("[", "{")) and is_read(literal := f"{key}={_literal(value)}"):
        return literal
    if (name := _unwritable(value)) is not None:
        rule = f"has a name, {name}, with a character that Hydra's command line has no letter for"
        fix = r"Put it into a YAML file (+experiment=...); a regular expression may begin with \A in place of ^."
        raise ConfigError(key, rule, got=value, fix=fix)
    values = re.split(r",(?![^\[]*\])", value) if several else [value]
    return f"{key}={','.join(one if is_read(f'{key}={one}') else quoted(one) for one in values)}"


def _check_encoding(override: str) -> None:
    """Raises ConfigError if the override was not UTF-8. Python decodes other bytes to surrogates, which can't be written to files
    or JSON."""
    try:
        override.encode()
    except UnicodeEncodeError:
        key, _, value = override.partition("=")
        fix = "Type it in UTF-8; a file with such a name must get another one."
        raise ConfigError(key, "must be text in UTF-8", got=value, fix=fix) from None


def swept(override: str) -> tuple[str, Values] | None:
    """The setting (with its plus signs) and the values of an override that has several; None if it has one value.

    Forms: 8,16,32, choice(8,16), range(0,4), interval(0,1), int(interval(8,64)), tag(log,interval(1e-5,1e-3)), and glob(*) for
    options of a group.
    """
    key, _, value = override.partition("=")
    typed = as_typed(override, several=True)
    unread = ConfigError(
        key.lstrip("+"),
        "has values that can't be read",
        got=value,
        fix="Say, 8,16,32, range(0,4), interval(0,1) or tag(log,interval(1e-5,1e-3)).",
    )
    if not is_read(typed) or (not is_read(override) and re.match(SEVERAL, value)):
        raise unread
    read = parsed(typed)
    if not read.is_sweep_override():
        return None
    setting = read.input_line.partition("=")[0] if read.input_line else read.key_or_group
    values = cast(Any, read.value())
    if isinstance(values, Glob):
        return setting, Choice(tuple(values.filter(options(read.key_or_group))))
    if isinstance(values, IntervalSweep):
        assert values.start is not None and values.end is not None
        whole = isinstance(values.start, int) and isinstance(values.end, int)
        return setting, Interval(values.start, values.end, log="log" in values.tags, whole=whole)
    if isinstance(values, RangeSweep):
        _check_range(key.lstrip("+"), values)
    shuffled, values.shuffle = values.shuffle, False
    found = [_plain(item) for item in read.sweep_iterator()]
    if any(isinstance(item, Sweep) for item in found):
        raise unread
    if shuffled:
        # The same order each time, unlike Hydra's, so that the same command resumes a sweep.
        random.Random(typed).shuffle(found)
    return setting, Choice(tuple(found))


def _check_range(setting: str, values: RangeSweep) -> None:
    """Raises ConfigError for a range without a step or with too many values, before the values are enumerated."""
    assert values.start is not None and values.stop is not None
    if not values.step:
        raise ConfigError(setting, "must have a step other than 0 in its range", got=values.step, fix="Leave the step out.")
    count = math.ceil((values.stop - values.start) / values.step)
    check_length(setting, count, values.start, values.stop - values.step)


def one_value(override: str) -> tuple[str, Any]:
    """The setting of an override, and its value. Raises ConfigError if it has several."""
    word = as_typed(override)
    read = parsed(word)
    setting, _, value = word.partition("=")
    if read.is_sweep_override():
        raise ConfigError(setting, "must have one value here", got=value)
    return setting, _plain(read.value())


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def as_override(setting: str, value: Any) -> str:
    """The override in Hydra's grammar that sets a plain value."""
    return f"{setting}={_word(value)}"


def as_word(setting: str, value: Any) -> str:
    """The override as a user would type it. Text is quoted only if it would be read as something else (a,b is two values)."""
    word = f"{setting}={value}"
    try:
        read = one_value(word)[1]
    except ConfigError:
        read = None
    return word if read == value else as_override(setting, value)


def parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(item)}' for key, item in value.items())}}}"
    return quoted(value) if isinstance(value, str) else as_text(value)


def is_read(override: str) -> bool:
    try:
        parsed(override)
    except HydraException:
        return False
    return True


def _is_open(value: str) -> bool:
    """Whether a list, an object or a quote is not closed."""
    if value.startswith(("'", '"')):
        return len(value) == 1 or not value.endswith(value[0])
    return any(value.startswith(start) and value.count(start) > value.count(end) for start, end in ("[]", "{}"))


def _literal(value: str) -> str:
    """A YAML list or object in Hydra's grammar, with quoted texts; other values unchanged."""
    try:
        return _in_hydras_words(yaml.load(value, yaml.BaseLoader))
    except YAMLError:
        return value


ANCHOR = "^"


def _unwritable(value: str) -> str | None:
    """A regular expression as a key of an object (not of a text in braces) that can't be written in Hydra's grammar. Other such
    keys are left to settings that also take a text, as model.new_tokens does."""
    try:
        named = typed_object(value) or {}
    except NOT_YAML:
        return None
    return next((str(key) for key, item in named.items() if item is not None and ANCHOR in str(key)), None)


def _escaped(key: str) -> str:
    """A key as Hydra's grammar reads it, which has no quotes for keys: {(q|k)_proj: 2} is {\\(q|k\\)_proj: 2}."""
    key = re.sub(r"\\{2,}|\\(?=[()\[\]{}:=,\s]|$)", lambda found: 2 * found[0], key)
    return re.sub(r"[()\[\]{}:=,\s]", r"\\\g<0>", key)


def _in_hydras_words(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_in_hydras_words, node))}]"
    if isinstance(node, dict):
        return f"{{{','.join(f'{_escaped(key)}:{_in_hydras_words(item)}' for key, item in node.items())}}}"
    is_text = not is_read(f"key={node}") or isinstance(parsed(f"key={node}").value(), str)
    return quoted(node) if is_text else node
