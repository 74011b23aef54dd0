"""Tool formats: thirteen ways to declare tools to a model, and to write and parse its calls.

The text that a model sees is Jinja, in templates/tools/<format>.jinja (`tool_text(tools)` and `call_text(calls)`), so that a
saved chat template contains it. The parsers are here, one function for each format.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOOLS_FOLDER = Path(__file__).parent / "tools"


class ToolCall(NamedTuple):
    """A call as a model wrote it."""

    name: str
    arguments: str
    """JSON text, as in chat APIs. It may not be an object, if the model wrote none."""


def function_of(tool: Any) -> Any:
    """The `function` object in a tool call or a tool declaration, or the object itself if it has none."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function if isinstance(function, Mapping) else tool


def name_and_arguments(call: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of a call in any form that rows have: as the `function` of an object or by itself, with
    arguments as an object, as JSON text, or without any. Raises ValueError.
    """
    function = function_of(call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call must have a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError("a tool call's arguments must be a JSON object") from None
    if not isinstance(arguments or {}, Mapping):
        raise ValueError("a tool call's arguments must be a JSON object")
    return function["name"], dict(arguments or {})


def render_tools(tool_format: str, tools: Sequence[Mapping[str, Any]], *, date: str | None = None) -> str:
    """The text that declares `tools`. date: the date that llama3 writes, such as 31 Jan 2025.

    Raises jinja2.TemplateError if a tool is not a JSON object.
    """
    return _macros(tool_format, date).tool_text(tools) if tools else ""


def render_calls(tool_format: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """The text of calls {"name": str, "arguments": JSON object}.

    Raises jinja2.TemplateError if the format can't express them: glm4 has one call per turn.
    """
    return _macros(tool_format, None).call_text(calls)


def extract_calls(tool_format: str, text: str, *, marked: bool = False) -> str | list[ToolCall]:
    """The calls in a model's text, or the text itself if it has none that parse. It raises for no text.

    `beside_calls` gives the text around the calls. marked: accept calls after white space or a token that begins calls, which
    LLaMA-Factory does not.
    """
    try:
        calls = (MARKED if marked and tool_format in MARKED else EXTRACTORS)[tool_format](text)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError):
        return text
    return text if calls is None else calls


def beside_calls(tool_format: str, text: str) -> str:
    """The text before, between and after the calls; empty in formats that have no markers around calls."""
    words = CALL_WORDS.get(tool_format)
    if words is None:
        return ""
    return re.sub(f"{re.escape(words[0])}.*?{re.escape(words[1])}", "", text, flags=re.DOTALL).strip()


def parse_call_turn(
    content: str,
    *,
    thought: Sequence[str] = ("<think>\n", "\n</think>\n\n"),
    call_words: Sequence[str] = ("<tool_call>", "</tool_call>"),
) -> tuple[str, tuple[dict[str, Any], ...]]:
    """The text and the calls of a turn with JSON in it: one call or a list of calls, bare, after reasoning, or between
    call_words.

    Text outside the call words, even after a call, becomes the content, which comes before the calls in a message. Arguments may
    be JSON text. Raises ValueError if a call is not {"name": ..., "arguments": {...}}.
    """
    wrapped = re.compile(f"{re.escape(call_words[0])}(.*?){re.escape(call_words[1])}", re.DOTALL)
    if bodies := wrapped.findall(content):
        return wrapped.sub("", content), tuple(call for body in bodies for call in _read_calls(body))
    found = re.search(f"{re.escape(thought[0])}.*?{re.escape(thought[1])}", content, re.DOTALL)
    text = found.group() if found else ""
    return text, tuple(_read_calls(content.replace(text, "") if text else content))


def _read_calls(text: str) -> Iterator[dict[str, Any]]:
    calls = json.loads(text)
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
            raise ValueError(f"a call must be an object with a name and arguments, got {json.dumps(call)}")
        arguments = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of {call['name']} must be an object, got {json.dumps(arguments)}")
        yield {"name": call["name"], "arguments": arguments}


@lru_cache(maxsize=64)
def _macros(tool_format: str, date: str | None) -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # The names that transformers gives a chat template, with its tojson: no HTML escapes, letters of any language as they are.
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    source = (TOOLS_FOLDER / f"{tool_format}.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).make_module({} if date is None else {"date": date})


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    """The value of a parameter between tags: parsed if it is JSON, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _calls_of_objects(objects: Sequence[Any], arguments_key: str) -> list[ToolCall]:
    if not all(isinstance(item["name"], str) for item in objects):
        raise TypeError("a tool's name must be text")
    return [ToolCall(item["name"], _json(item[arguments_key])) for item in objects]


def _extract_default(text: str) -> list[ToolCall] | None:
    pairs = re.findall(r"Action:\s*([^\n]+?)\s*Action Input:\s*(.+?)(?=\s*Action:|\s*$)", text, re.DOTALL)
    return [ToolCall(name, _json(json.loads(body.strip().strip('"').strip("`").strip()))) for name, body in pairs] or None


def _extract_gemma4(text: str) -> list[ToolCall] | None:
    pairs = re.findall(r"<\|tool_call>call:([^{]+)\{(.*?)\}<tool_call\|>", text, re.DOTALL)
    return [ToolCall(name.strip(), _gemma_arguments(body)) for name, body in pairs] or None


def _gemma_arguments(body: str) -> str:
    """Gemma's arguments as JSON: bare keys get quotes, and <|"|> around strings becomes a quote. The text itself if that
    fails."""
    pieces = f"{{{body}}}".split('<|"|>')
    for i, piece in enumerate(pieces):
        pieces[i] = (
            _json(piece)
            if i % 2
            else re.sub(r'([{,])\s*([^\s{},:"\[\]][^{},:"]*?)\s*:', lambda m: f"{m[1]}{_json(m[2])}:", piece)
        )
    try:
        return _json(json.loads("".join(pieces)))
    except (ValueError, RecursionError):
        return body


def _extract_glm4(text: str) -> list[ToolCall] | None:
    name, newline, arguments = text.partition("\n")
    return [ToolCall(name, _json(json.loads(arguments)))] if newline else None


def _extract_glm4_moe(text: str) -> list[ToolCall] | None:
    calls = []
    for body in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL):
        name, found, _ = body.partition("<arg_key>")
        if not found and name.strip().startswith("{"):
            calls += _calls_of_objects([json.loads(body)], "arguments")
            continue
        if not name.strip():
            return None
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|$))", body, re.DOTALL)
        calls.append(ToolCall(name.strip(), _json({key: _value(value) for key, value in pairs})))
    return calls or None


def _extract_lfm2(text: str) -> list[ToolCall] | None:
    """A list of calls in Python syntax, whose brackets may be missing."""
    calls: list[ToolCall] = []
    for body in re.findall(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", text, re.DOTALL):
        written = ast.parse(body.strip(), mode="eval").body
        listed = written.elts if isinstance(written, ast.List | ast.Tuple) else [written]
        for call in listed:
            if not isinstance(call, ast.Call):
                return None
            arguments = {word.arg: _literal(word.value) for word in call.keywords}
            calls.append(ToolCall(ast.unparse(call.func), _json(arguments)))
    return calls or None


def _literal(node: ast.expr) -> Any:
    """Python's literals and JSON's true, false and null, at any depth."""
    names = {"true": True, "false": False, "null": None}
    match node:
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_literal(key): _literal(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case _:
            return ast.literal_eval(node)


def _extract_llama3(text: str) -> list[ToolCall] | None:
    calls = json.loads(text)
    return _calls_of_objects(calls if isinstance(calls, list) else [calls], "parameters")


def _extract_marked_mistral(text: str) -> list[ToolCall] | None:
    text = text.strip().removeprefix("[TOOL_CALLS]")
    if "[ARGS]" in text:  # newer models
        pairs = (re.split(r"(?:\[CALL_ID\]\w+)?\[ARGS\]", call, maxsplit=1) for call in text.split("[TOOL_CALLS]"))
        return [ToolCall(name.strip(), _json(json.loads(arguments))) for name, arguments in pairs]
    return _extract_mistral(text)


def _extract_mistral(text: str) -> list[ToolCall] | None:
    calls = json.loads(text)
    return _calls_of_objects(calls if isinstance(calls, list) else [calls], "arguments")


def _extract_minimax1(text: str) -> list[ToolCall] | None:
    found = re.search(r"<tool_calls>(.*?)</tool_calls>", text, re.DOTALL)
    objects = [_value(line.strip()) for line in found[1].split("\n") if line.strip()] if found else None
    return None if objects is None else _calls_of_objects([item for item in objects if not isinstance(item, str)], "arguments")


def _extract_minimax2(text: str) -> list[ToolCall] | None:
    found = re.search(r"<minimax:tool_call>(.*?)</minimax:tool_call>", text, re.DOTALL)
    if not found:
        return None
    calls = re.findall(r'<invoke name="(.*?)">(.*?)</invoke>', found[1], re.DOTALL)
    return [ToolCall(name, _parameters(body, r'<parameter name="(.*?)">')) for name, body in calls]


def _extract_qwen(text: str) -> list[ToolCall] | None:
    bodies = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    return _calls_of_objects([json.loads(body) for body in bodies], "arguments") or None


def _extract_qwen3_5(text: str) -> list[ToolCall] | None:
    calls = re.findall(r"<tool_call>\s*<function=([^>]+)>(.*?)</function>\s*</tool_call>", text, re.DOTALL)
    return [ToolCall(name, _parameters(body, r"<parameter=([^>]+)>\s*", r"\s*")) for name, body in calls] or None


def _extract_seed_oss(text: str) -> list[ToolCall] | None:
    # The ">" after the name is optional: models trained with LLaMA-Factory leave it out.
    calls = re.findall(r"<seed:tool_call>\s*<function=([^\s>]+)>?\s(.*?)</function>\s*</seed:tool_call>", text, re.DOTALL)
    return [ToolCall(name, _parameters(body, r"<parameter=([^>]+)>")) for name, body in calls] or None


def _parameters(body: str, start: str, before_end: str = "") -> str:
    """The parameters between tags, as JSON. A closing tag counts only if another parameter or the end follows it."""
    pairs = re.findall(rf"{start}(.*?){before_end}</parameter>(?=\s*(?:<parameter|$))", body, re.DOTALL)
    return _json({name: _value(value) for name, value in pairs})


_QWEN_WORDS = ("<tool_call>", "</tool_call>")
CALL_WORDS: dict[str, tuple[str, str]] = {
    "gemma4": ("<|tool_call>", "<tool_call|>"),
    "glm4_moe": _QWEN_WORDS,
    "lfm2": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "ling": _QWEN_WORDS,
    "minimax1": ("<tool_calls>", "</tool_calls>"),
    "minimax2": ("<minimax:tool_call>", "</minimax:tool_call>"),
    "qwen": _QWEN_WORDS,
    "qwen3_5": _QWEN_WORDS,
    "seed_oss": ("<seed:tool_call>", "</seed:tool_call>"),
}
"""Format -> the markers before and after a call, if it has any."""
EXTRACTORS: dict[str, Callable[[str], list[ToolCall] | None]] = {
    "default": _extract_default,
    "gemma4": _extract_gemma4,
    "glm4": _extract_glm4,
    "glm4_moe": _extract_glm4_moe,
    "lfm2": _extract_lfm2,
    "ling": _extract_qwen,
    "llama3": _extract_llama3,
    "minimax1": _extract_minimax1,
    "minimax2": _extract_minimax2,
    "mistral": _extract_mistral,
    "qwen": _extract_qwen,
    "qwen3_5": _extract_qwen3_5,
    "seed_oss": _extract_seed_oss,
}
MARKED: dict[str, Callable[[str], list[ToolCall] | None]] = {
    "glm4": lambda text: _extract_glm4(text.lstrip()),
    "llama3": lambda text: _extract_llama3(text.strip().removeprefix("<|python_tag|>")),
    "mistral": _extract_marked_mistral,
}
