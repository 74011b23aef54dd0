"""What answers may hold under a schema is asked of xgrammar itself, with a vocabulary of bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_llm.data.tokens.tokenizer import byte_tokenizer
from raytune_llm.serve.api.json_schemas import MAX_OPTIONAL_PROPERTIES, check_counts, enforceable

xgrammar = pytest.importorskip("xgrammar")
INTEGER = {"type": "integer"}


@pytest.fixture(scope="module")
def compiler() -> Any:
    tokenizer = byte_tokenizer()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer), stop_token_ids=[tokenizer.eos_token_id])
    return xgrammar.GrammarCompiler(info, max_threads=1)


def allows(compiler: Any, schema: dict[str, Any], answer: Any) -> bool:
    matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema)))
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return matcher.accept_string(text) and matcher.is_completed()


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "object", "required": ["a"]}, {"a": 1}, {"b": 1}),
        ({"type": "object", "required": ["a"], "properties": {"b": INTEGER}}, {"b": 1, "a": "x"}, {"b": 1}),
        ({"required": ["a"], "additionalProperties": INTEGER}, {"a": 1}, {"a": "x"}),
        ({"type": "object", "maxProperties": 1}, {"a": 1}, {"a": 1, "b": 2}),
        ({"type": "array", "minItems": 1}, [1, "a"], []),
        ({"minLength": 2}, "ab", "a"),
        ({"minimum": 5}, 6, 4),
        ({"pattern": "^a$"}, "a", "b"),
    ],
    ids=json.dumps,
)
def test_what_a_schema_leaves_open_keeps_nothing_from_being_enforced(compiler: Any, schema: Any, right: Any, wrong: Any):
    kept, ignored = enforceable(schema)
    assert not ignored and allows(compiler, kept, right) and not allows(compiler, kept, wrong)


@pytest.mark.parametrize(
    ("schema", "wrong", "names"),
    [
        ({"type": "array", "items": INTEGER, "uniqueItems": True}, [1, 1], ["uniqueItems"]),
        ({"type": "array", "items": INTEGER, "contains": {"const": 5}}, [1], ["contains"]),
        ({"type": "integer", "not": {"const": 3}}, 3, ["not"]),
        ({"type": "object", "properties": {"a": INTEGER}, "if": {}, "then": {"required": ["a"]}}, {}, ["if", "then"]),
        ({"allOf": [INTEGER, {"minimum": 5}]}, 1, ["allOf"]),
        ({"enum": [1, 9], "minimum": 5}, 1, ["minimum"]),
        ({"$defs": {"a": INTEGER}, "$ref": "#/$defs/a", "minimum": 5}, 1, ["minimum"]),
        ({"type": "number", "multipleOf": 0.5}, 0.3, ["multipleOf"]),
        ({"type": "integer", "multipleOf": 5000}, 3, ["multipleOf"]),
        ({"type": "string", "pattern": "^a*$", "maxLength": 2}, "aaa", ["maxLength"]),
        ({"type": "string", "pattern": "^(?=b)[a-z]$"}, "a", ["pattern"]),
        ({"$ref": "http://elsewhere/schema"}, 1, ["$ref"]),
        ({"type": "object", "properties": {"a": INTEGER}, "anyOf": [{"required": ["a"]}]}, {}, ["anyOf"]),
        ({"type": "object", "properties": {"a": {"items": {"$dynamicRef": "#b"}}}}, {"a": [1]}, ["$dynamicRef"]),
    ],
    ids=json.dumps,
)
def test_what_is_not_enforced_is_named(compiler: Any, schema: Any, wrong: Any, names: list[str]):
    """If an answer is refused one day, its keyword needs no name any more."""
    kept, ignored = enforceable(schema)
    assert ignored == names and allows(compiler, schema, wrong) and allows(compiler, kept, wrong)


def test_an_object_keeps_its_properties_beside_alternatives_that_only_require(compiler: Any):
    kept, _ = enforceable({"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "anyOf": [{"required": ["b"]}]})
    assert allows(compiler, kept, {"a": 1}) and not allows(compiler, kept, {"a": "x"}) and not allows(compiler, kept, {})


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ({"pattern": '^"$'}, b'"""'),
        ({"pattern": r"^\\$"}, b'"\\"'),
        ({"pattern": r"^\n$"}, b'"\n"'),
        ({"pattern": r"^\x22$"}, b'"""'),
        ({"format": "json-pointer"}, b'"/""'),
    ],
    ids=str,
)
def test_a_rule_under_which_an_answer_may_be_no_json_is_left_out(compiler: Any, rule: dict, broken: bytes):
    kept, ignored = enforceable({"type": "string", **rule})
    assert ignored == [*rule]
    assert allows(compiler, {"type": "string", **rule}, broken) and not allows(compiler, kept, broken)


@pytest.mark.parametrize("pattern", ["^[^a]$", r"^\S$", r"^[\s\S]$", "^.$", r'^[^"\\]$', r"^[\n ]$", "^[ -~]$"])
def test_classes_of_characters_leave_out_what_would_end_a_string(compiler: Any, pattern: str):
    kept, ignored = enforceable({"type": "string", "pattern": pattern})
    assert not ignored and not any(allows(compiler, kept, b'"%s"' % one) for one in (b'"', b"\\", b"\n", b"\x1f"))


def test_ordinary_schemas_stay_as_they_are():
    address = {"type": "object", "properties": {"city": {"type": "string", "minLength": 1}}, "required": ["city"]}
    schema = {
        "$defs": {"Address": address},
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": r"^[A-Z]\w{1,30}$", "description": "not an alias"},
            "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None, "title": "Age"},
            "home": {"$ref": "#/$defs/Address", "description": "where"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"], "type": "string"}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    assert enforceable(schema) == (schema, [])


def test_schemas_that_would_take_long_to_compile_are_refused():
    many = {f"{number:x}": {} for number in range(MAX_OPTIONAL_PROPERTIES + 1)}
    for schema, message in [
        ({"properties": many}, "at most 500 optional properties, got 501: list them in `required`"),
        ({"anyOf": [{"properties": dict([pair])} for pair in many.items()]}, "got 501"),
        ({"properties": {str(number): {} for number in range(65)}, "minProperties": 3}, "minProperties or maxProperties, got 65"),
        ({"type": "string", "pattern": "^(a{1,100}){1,100}$"}, "at most 1000 characters, got 1"),
        ({"properties": {str(number): {"pattern": "^a{1,120}$"} for number in range(9)}}, "got 1080"),
        ({"properties": {"a": {"type": "string", "description": "x" * 70_000}}}, "at most 65536 bytes"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "which its additionalProperties forbid"),
    ]:
        with pytest.raises(ValueError, match=message):
            enforceable(schema)
    required = {"type": "object", "properties": many, "required": [*many]}
    assert enforceable(required) == (required, [])
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ValueError, match="nested so deeply"):
        enforceable(deep)


@pytest.mark.parametrize(
    ("regex", "message"),
    [("[a-z]{1,129}", "at most 128, got 129"), ("a{130,}", "got 130"), ("(a{1,100}){1,100}", "1000 characters")],
)
def test_counts_that_xgrammar_fails_on_or_takes_long_for_are_refused(regex: str, message: str):
    with pytest.raises(ValueError, match=message):
        check_counts(regex)


def test_ordinary_counts_are_taken():
    for regex in (r"^\d{4}-\d{2}-\d{2}$", r"^(\d{1,3}\.){3}\d{1,3}$", "[{}]{3}b{x}", "^[a-z]{2,128}$"):
        check_counts(regex)


def test_a_pattern_with_a_large_count_is_left_out(compiler: Any):
    pattern = {"type": "string", "pattern": "^[a-z]{1,255}$"}
    with pytest.raises(RuntimeError):  # if it compiles one day, the pattern can stay
        allows(compiler, pattern, "a")
    assert enforceable(pattern) == ({"type": "string"}, ["pattern"])
