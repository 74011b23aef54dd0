"""JSON schemas as xgrammar enforces them.

xgrammar ignores some keywords silently, and some schemas keep it busy for minutes. Here such keywords are left out and named, so
that the API can say so, and such schemas are refused. Where xgrammar would ignore a keyword because a schema leaves something
open, that is made explicit: the type that keywords are about, and a schema for a property that is only required.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from math import prod
from typing import Any

MAX_SCHEMA_BYTES = 65_536
MAX_OPTIONAL_PROPERTIES = 500
"""Of all objects of a schema. The time that xgrammar takes grows with the square of an object's."""
MAX_COUNTED_PROPERTIES = 64
"""Optional properties of an object with minProperties or maxProperties."""
MAX_COUNT = 128
"""xgrammar 0.2 fails on most regular expressions with a larger count."""
MAX_REPEATS = 1_000
"""What the counts in a regular expression, or in all patterns of a schema, stand for."""

IGNORED = {
    *("uniqueItems", "contains", "minContains", "maxContains", "additionalItems", "not", "if", "then", "else"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"),
}
DECIDING = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""The first of these in a schema decides, and xgrammar ignores its other rules."""
PROPERTIES = ("properties", "additionalProperties", "patternProperties", "unevaluatedProperties")
ITEMS = ("items", "prefixItems", "unevaluatedItems")
RULES = {
    "object": (*PROPERTIES, "required", "propertyNames", "minProperties", "maxProperties"),
    "array": (*ITEMS, "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""The keywords about values of a type."""
BROKEN_FORMATS = ("json-pointer", "relative-json-pointer")
"""xgrammar allows quotation marks in these, which would end the string."""
MAX_MULTIPLE = 1024
"""xgrammar ignores a larger multipleOf."""
COUNT = re.compile(r"(.)\{(\d+)(?:,(\d*))?\}", re.DOTALL)
CLASS = re.compile(r"\[\^?(?:\\.|[^\\])(?:\\.|[^\\\]])+\]", re.DOTALL)
"""A class of several characters. xgrammar leaves quotation marks, backslashes and control characters out of it by itself."""
UNWRITTEN = re.compile(r'["\x00-\x1f]|\\(?:["\\nrtfv0]|c|x[01]|x22|x5[cC]|u00[01]|u0022|u005[cC])')
"""Characters of a pattern that a JSON string holds as escapes, which xgrammar would allow as they are."""
LOOKAROUND = re.compile(r"\(\?<?[=!]")


def enforceable(schema: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A copy without the keywords that xgrammar ignores, and their names. Raises ValueError for a schema that is too large, or
    that would take too long to compile."""
    copy: dict[str, Any] = json.loads(schema_text(schema))
    ignored: set[str] = set()
    optional = repeats = 0
    waiting: list[Any] = [copy]
    while waiting:
        if not isinstance(node := waiting.pop(), dict):
            continue
        for keyword in list(_unenforced(node)):
            ignored.add(keyword)
            node.pop(keyword, None)
        _make_explicit(node)
        waiting += _children(node)
        free = len(_dict(node, "properties").keys() - set(map(str, _list(node, "required"))))
        if free > MAX_COUNTED_PROPERTIES and ("minProperties" in node or "maxProperties" in node):
            where = "in an object with minProperties or maxProperties"
            raise ValueError(f"a JSON schema must have at most {MAX_COUNTED_PROPERTIES} optional properties {where}, got {free}")
        optional += free
        repeats += sum(map(_repeats, _patterns(node)))
    if optional > MAX_OPTIONAL_PROPERTIES:
        limit = f"a JSON schema must have at most {MAX_OPTIONAL_PROPERTIES} optional properties"
        raise ValueError(f"{limit}, got {optional}: list them in `required`")
    _check_repeats(repeats)
    return copy, sorted(ignored)


def schema_text(schema: dict[str, Any]) -> str:
    """Raises ValueError if it is too large."""
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise ValueError("a JSON schema must not be nested so deeply") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(f"a JSON schema must have at most {MAX_SCHEMA_BYTES} bytes")
    return text


def check_counts(regex: str) -> None:
    """Raises ValueError for counts in a regular expression, or in an EBNF grammar, that xgrammar can't compile in time."""
    if (largest := _largest_count(regex)) > MAX_COUNT:
        raise ValueError(f"a count in a regular expression must be at most {MAX_COUNT}, got {largest}: use * or +")
    _check_repeats(_repeats(regex))


def _check_repeats(repeats: int) -> None:
    if repeats > MAX_REPEATS:
        limit = f"counts in regular expressions must stand for at most {MAX_REPEATS} characters"
        raise ValueError(f"{limit}, got {repeats}: use * or +, or maxLength in place of a pattern")


def _repeats(regex: str) -> int:
    """How many characters the counts of a regular expression stand for, at most: 20 in a{1,20}. A count after a group multiplies
    everything."""
    counts = [(before == ")", int(most or least)) for before, least, most in COUNT.findall(regex)]
    of_groups = prod(count for is_group, count in counts if is_group)
    of_characters = sum(count for is_group, count in counts if not is_group)
    return (of_characters + (len(regex) if of_groups > 1 else 0)) * of_groups


def _largest_count(regex: str) -> int:
    return max((int(most or least) for _, least, most in COUNT.findall(regex)), default=0)


def _unenforced(node: dict[str, Any]) -> Iterator[str]:
    """Keywords of a schema itself, not of those within it."""
    ignored = IGNORED & node.keys()
    if isinstance(ref := node.get("$ref"), str) and re.match(r"#(/|$)", ref) is None:
        ignored.add("$ref")
    if len(_list(node, "allOf")) > 1:
        ignored.add("allOf")
    yield from ignored
    first = next((keyword for keyword in DECIDING if keyword in node.keys() - ignored), None)
    rules = {keyword for keywords in RULES.values() for keyword in keywords} & node.keys()
    if first in ("anyOf", "oneOf", "allOf") and rules and not any(map(_has_type, _list(node, first))):
        yield first  # it only adds to the rules, which say more
    elif first is not None:
        yield from (rules | set(DECIDING)) & node.keys() - {first}
        if "type" in node and first in ("anyOf", "oneOf", "allOf") and not all(map(_has_type, _list(node, first))):
            yield "type"
        return
    if node.get("format") in BROKEN_FORMATS:
        yield "format"
    pattern = node.get("pattern")
    if isinstance(pattern, str) and _is_lost(pattern):
        yield "pattern"
    elif pattern is not None:
        yield from {"minLength", "maxLength"} & node.keys()
    multiple = node.get("multipleOf")
    if multiple is not None and (node.get("type") != "integer" or not isinstance(multiple, int) or multiple > MAX_MULTIPLE):
        yield "multipleOf"


def _is_lost(pattern: str) -> bool:
    """xgrammar ignores it, fails on it, or would write what is no JSON."""
    is_unwritten = UNWRITTEN.search(CLASS.sub("", pattern)) is not None
    return is_unwritten or LOOKAROUND.search(pattern) is not None or _largest_count(pattern) > MAX_COUNT


def _has_type(branch: Any) -> bool:
    return isinstance(branch, dict) and not branch.keys().isdisjoint(("type", *DECIDING))


def _make_explicit(node: dict[str, Any]) -> None:
    if node.keys().isdisjoint(("type", *DECIDING)):
        about = next((type for type, rules in RULES.items() if not node.keys().isdisjoint(rules)), None)
        if about is not None:
            node["type"] = about
    if node.get("type") == "array" and node.keys().isdisjoint(ITEMS):
        node["items"] = True
    if node.get("type") != "object":
        return
    if node.keys().isdisjoint(PROPERTIES):
        node["additionalProperties"] = True
    known, others = _dict(node, "properties"), node.get("additionalProperties", True)
    missing = [name for name in map(str, _list(node, "required")) if name not in known]
    if "patternProperties" in node or not missing:
        return
    if others is False:
        raise ValueError(f"a JSON schema's `required` names {missing[0][:64]!r}, which its additionalProperties forbid")
    node["properties"] = {**known, **dict.fromkeys(missing, others)}


def _children(node: dict[str, Any]) -> Iterator[Any]:
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        yield from _dict(node, name).values()
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        yield from _list(node, name)
    for name in ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties", "propertyNames"):
        yield node.get(name)


def _patterns(node: dict[str, Any]) -> Iterator[str]:
    if isinstance(pattern := node.get("pattern"), str):
        yield pattern
    yield from _dict(node, "patternProperties")


def _dict(node: dict[str, Any], name: str) -> dict[str, Any]:
    return found if isinstance(found := node.get(name), dict) else {}


def _list(node: dict[str, Any], name: str) -> list[Any]:
    return found if isinstance(found := node.get(name), list) else []
