"""Converts the sampling fields of a request to the engine's `Sampling` and `Grammar`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from raytune_llm.engines.requests import Grammar, Sampling
from raytune_llm.serve.api.errors import invalid
from raytune_llm.serve.api.json_schemas import check_counts, enforceable, schema_text
from raytune_llm.serve.api.schema import (
    FunctionDeclaration,
    GenerationBody,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    is_number,
)


def sampling_of(
    body: GenerationBody,
    *,
    limit: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
    prompt_tokens: int,
    max_length: int,
    vocabulary: int,
    shown_ids: Sequence[int] = (),
) -> Sampling:
    """OpenAI's defaults apply: temperature 1, top_p 1.

    limit: maximum number of new tokens; None: as many as fit in max_length beside the prompt. logprobs: number of most likely
    tokens to report; None: no log-probabilities. shown_ids: special tokens that are part of the text. Raises APIError (400).
    """
    room = max_length - prompt_tokens
    if room < 1 or (limit is not None and limit > room):
        requested = f"{prompt_tokens} tokens of the prompt and {limit or 1} of the answer"
        raise invalid(
            f"This model's maximum context length is {max_length} tokens, but the request needs {requested}",
            None,
            "context_length_exceeded",
        )
    if body.min_tokens is not None and body.min_tokens > (limit or room):
        raise invalid("min_tokens must be at most max_tokens", "min_tokens")
    bias = []
    for token, value in (body.logit_bias or {}).items():
        if not is_number(token) or int(token) >= vocabulary:
            raise invalid(f"logit_bias must name tokens from 0 to {vocabulary - 1}, got {token[:32]}", "logit_bias")
        bias.append((int(token), value))
    return Sampling(
        max_new_tokens=limit or room,
        min_new_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, _or(body.top_k, 0)),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=tuple(bias),
        stop=tuple(body.stop or ()),
        shown_ids=tuple(shown_ids),
        ignore_end=bool(body.ignore_eos),
        logprobs=logprobs,
        grammar=grammar,
    )


def grammar_of(format: ResponseFormat | None, outputs: StructuredOutputs | None, ignored: set[str]) -> Grammar | None:
    """The grammar of OpenAI's response_format or vLLM's structured_outputs. None: the answer is free.

    ignored: gets the keywords of a schema that are not enforced. Raises APIError (400) for those of a strict schema; vLLM's are
    strict always.
    """
    if format is not None and format.json_schema is not None:
        asked = format.json_schema
        schema = _enforced(asked.schema_, "response_format.json_schema.schema", strict=bool(asked.strict), ignored=ignored)
        return Grammar(kind="json_schema", text=json.dumps(schema))
    if format is not None and format.type == "json_object":
        return Grammar(kind="json_schema", text='{"type": "object"}')
    if outputs is None:
        return None
    if outputs.json_ is not None:
        schema = _enforced(_parsed(outputs.json_), "structured_outputs.json", strict=True, ignored=ignored)
        return Grammar(kind="json_schema", text=json.dumps(schema))
    if outputs.choice is not None:
        return Grammar(kind="regex", text="|".join(f"({_literal(one)})" for one in outputs.choice))
    text = outputs.regex or outputs.grammar or ""
    try:
        check_counts(text)
    except ValueError as error:
        raise invalid(str(error), "structured_outputs") from None
    return Grammar(kind="ebnf" if outputs.regex is None else "regex", text=text)


def _enforced(schema: dict[str, Any], field: str, *, strict: bool, ignored: set[str]) -> dict[str, Any]:
    try:
        kept, names = enforceable(schema)
    except ValueError as error:
        raise invalid(str(error), field) from None
    if strict and names:
        raise invalid(f"{field} has keywords that can't be enforced: {', '.join(names)}", field)
    ignored.update(f"{field}.{name}" for name in names)
    return kept


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise invalid("structured_outputs.json must be a JSON schema, which is an object", "structured_outputs.json")
    return parsed


def _literal(text: str) -> str:
    """A regular expression of the text. xgrammar warns of an escape that it doesn't need, which re.escape writes."""
    return re.sub(r"[\\^$.|?*+()\[\]{}]", r"\\\g<0>", text)


def after_thought(grammar: Grammar, begin: str, end: str) -> Grammar:
    """`begin`, free text up to `end`, which ends a thought, and then what the grammar allows."""
    match grammar.kind:
        case "json_schema":
            answer: dict[str, Any] = {"type": "json_schema", "json_schema": json.loads(grammar.text)}
        case "regex":
            answer = {"type": "regex", "pattern": grammar.text}
        case "ebnf":
            answer = {"type": "grammar", "grammar": grammar.text}
        case "structural_tag":
            answer = json.loads(grammar.text)["format"]
        case _:
            raise AssertionError(f"{grammar.kind} is no grammar of whole answers")
    thought = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": end}
    elements = [thought, {"type": "regex", "pattern": r"\n{0,2}"}, answer]
    tags = {"type": "structural_tag", "format": {"type": "sequence", "elements": elements}}
    return Grammar(kind="structural_tag", text=json.dumps(tags))


def forced_tool_grammar(tools: Sequence[Tool], ignored: set[str]) -> Grammar:
    """The grammar of a call of one of the tools, with arguments that match its schema: {"name": ..., "arguments": {...}}.
    ignored: as in `grammar_of`."""
    calls: list[dict[str, Any]] = [
        {
            "type": "tag",
            "begin": f'{{"name": {json.dumps(tool.function.name)}, "arguments": ',
            # A schema of its own, so that references in it find what they name.
            "content": {"type": "json_schema", "json_schema": _parameters(tool.function, ignored)},
            "end": "}",
        }
        for tool in tools
    ]
    return _tagged(calls[0] if len(calls) == 1 else {"type": "or", "elements": calls})


def strict_tools_grammar(tools: Sequence[Tool], tool_format: str | None) -> Grammar | None:
    """Text that may hold calls, where arguments of a strict tool are of its schema; None where no tool is strict. Raises APIError
    for a format whose calls can't be distinguished from text while they are generated."""
    if not any(tool.function.strict for tool in tools):
        return None
    if tool_format not in STRICT_CALLS:
        raise invalid(
            "This model's way of writing calls can't be held to a schema beside text: "
            "set tool_choice to `required` or to a tool, or leave out strict",
            "tools",
        )
    word, begin, end, style = STRICT_CALLS[tool_format]
    tags = [
        {
            "type": "tag",
            "begin": begin.format(name=tool.function.name),
            "content": {"type": "json_schema", "style": style, "json_schema": _arguments_schema(tool.function)},
            "end": end,
        }
        for tool in tools
    ]
    return _tagged({"type": "triggered_tags", "triggers": [word], "tags": tags})


STRICT_CALLS: dict[str | None, tuple[str, str, str, str]] = {
    "qwen": ("<tool_call>", '<tool_call>\n{{"name": "{name}", "arguments": ', "}\n</tool_call>", "json"),
    "qwen3_5": ("<tool_call>", "<tool_call>\n<function={name}>\n", "\n</function>\n</tool_call>", "qwen_xml"),
}
"""Formats of calls (data/templates/tool_calls.py): the word that only a call begins with, what stands before and after a call's
arguments, and xgrammar's name for how they are written."""


def _arguments_schema(function: FunctionDeclaration) -> dict[str, Any]:
    return _parameters(function, set()) if function.strict else {"type": "object"}


def _parameters(function: FunctionDeclaration, ignored: set[str]) -> dict[str, Any]:
    if not function.parameters:
        return NO_ARGUMENTS
    schema = {"type": "object", **function.parameters}
    return _enforced(schema, "tools.function.parameters", strict=bool(function.strict), ignored=ignored)


def _tagged(format: dict[str, Any]) -> Grammar:
    try:
        return Grammar(kind="structural_tag", text=schema_text({"type": "structural_tag", "format": format}))
    except ValueError as error:
        raise invalid(str(error), "tools") from None


NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
