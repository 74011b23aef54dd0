"""A raw row -> a record. Which messages are trained is decided here and nowhere else.

A format is a function from a row and its section of the config (the names of its columns) to a Record, raising BadRow. To add
one: the function and its entry in FORMATS, its section in config/data.py, and conf/data/<name>.yaml.

What a row is, its columns say: with `chosen` and `rejected` a Pair, with a true or false `label` a Labeled answer, else a
Conversation, which may lack an answer where only prompts are wanted.

`sharegpt`, `openai` and `alpaca` keep LLaMA-Factory's rules about order and about values of the wrong type. Different here: no
"detailed thinking off" is added to system texts, text beside tool calls and results at the end are kept, parallel results stay
apart, and a row with an unknown role or with a wrong role in an answer is dropped and counted.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from raytune_llm.data.dropped import BadRow
from raytune_llm.data.tools import parse_call_turn
from raytune_llm.records import Conversation, Labeled, Media, Message, Pair, Record, Role, Text

if TYPE_CHECKING:
    from raytune_llm.config.data import (
        AlpacaFormat,
        ChatFormat,
        Columns,
        FormatConfig,
        OpenAIFormat,
        PromptCompletionFormat,
        ShareGPTFormat,
        Tags,
        TextFormat,
    )

Row = Mapping[str, Any]
ROLES = get_args(Role)


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a row takes beyond its columns."""

    media_dir: str | None = None
    """Where a relative path of an image, video or audio is looked for first."""
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    """What encloses a thought, and JSON calls, in a message of tool calls: as the chat template writes them."""
    untyped: bool = False
    """Every value is a text, as in csv: a label is true where it reads true or 1, and false where it reads false or 0."""


def converter(format: FormatConfig, reading: Reading = Reading()) -> Callable[[Row], Record]:
    """The function that makes a record of each row, or raises BadRow."""
    return functools.partial(convert, format=format, reading=reading)


def convert(row: Row, format: FormatConfig, reading: Reading = Reading()) -> Record:
    if not isinstance(row, Mapping):
        raise BadRow("a row must be an object", _shown(row))
    return FORMATS[format.name](row, format, reading)


def last_answer_only(conversation: Conversation) -> Conversation:
    """With no answer trained but the last message, if that is one that was to be trained."""
    *earlier, last = conversation.messages
    return replace(conversation, messages=(*(replace(message, trained=False) for message in earlier), last))


# Formats --------------------------------------------------------------------------------------------------------------


def chat(row: Row, columns: ChatFormat, reading: Reading) -> Record:
    """{role, content} messages, as OpenAI's API takes them, in any order that the chat template takes.

    Every answer is trained, by its weight where it says one: `train: false` and `weight: 0` leave it out. The sides of a pair are
    texts, messages, or lists of messages, with the request or after it.
    """
    turns: tuple[Message, ...] = ()
    media = _media(row, columns, reading)
    ranked = columns.chosen is not None and columns.rejected is not None
    if columns.messages is not None and not (ranked and row.get(columns.messages) is None):
        turns, media = _messages(_required(row, "messages", columns.messages), columns.messages, media)
    if any(turn.role == "system" for turn in turns[1:]):
        raise BadRow("a system message must come first")
    conversation = Conversation(turns, _tools(_optional(row, columns.tools)), media)
    if columns.chosen is not None and columns.rejected is not None:
        return _pair(
            conversation,
            _side(_required(row, "chosen", columns.chosen), columns.chosen),
            _side(_required(row, "rejected", columns.rejected), columns.rejected),
            _margin(row, columns.margin, reading),
        )
    if not turns:
        raise BadRow("there are no messages")
    return _judged(conversation, _optional(row, columns.label), reading)


def alpaca(row: Row, columns: AlpacaFormat, reading: Reading) -> Record:
    """One request, with its input on a new line, and its answer; before it, [request, answer] pairs of history.

    Every answer is trained. An answer that is no text is none.
    """
    requested = _text(_required(row, "instruction", columns.instruction), columns.instruction)
    context = _optional_text(row, columns.input)
    tools = _optional(row, columns.tools)
    turns = [*_system(_optional_text(row, columns.system), tools)]
    history = _optional(row, columns.history) or ()
    if not isinstance(history, list | tuple):
        raise BadRow(f"{columns.history} must be a list of [request, answer] pairs", _shown(history))
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{columns.history} must be a list of [request, answer] pairs", _shown(pair))
        turns.append(Message("user", _text(pair[0], f"{columns.history}")))
        turns.append(Message("assistant", _text(pair[1], f"{columns.history}"), trained=True))
    turns.append(Message("user", "\n".join(part for part in (requested, context) if part)))
    prompt_only = Conversation(tuple(turns), _tools(tools), _media(row, columns, reading))
    if columns.chosen is not None and columns.rejected is not None:
        sides = [_required(row, "chosen", columns.chosen), _required(row, "rejected", columns.rejected)]
        for side in sides:
            _text(side, "an answer of a pair")
        chosen, rejected = ((Message("assistant", side, trained=True),) for side in sides)
        return Pair(prompt_only, chosen, rejected, _margin(row, columns.margin, reading))
    if columns.output is None:
        return prompt_only
    answer = _required(row, "output", columns.output)
    if not isinstance(answer, str):
        return prompt_only
    answered = replace(prompt_only, messages=(*turns, Message("assistant", answer, trained=True)))
    return _judged(answered, _optional(row, columns.label), reading)


def sharegpt(row: Row, columns: ShareGPTFormat, reading: Reading) -> Record:
    """Requests or tool results in turn with answers or tool calls, after an optional system message.

    A call is a message with JSON in it. Every answer is trained, by its weight where it says one.
    """
    return _alternating(row, columns, reading, _tagged, several_results=False)


def openai(row: Row, columns: OpenAIFormat, reading: Reading) -> Record:
    """The same, where an answer can hold `tool_calls` and several results can follow one another.

    Every answer is trained, by its weight where it says one.
    """
    return _alternating(row, columns, reading, _tagged_with_calls, several_results=True)


def prompt_completion(row: Row, columns: PromptCompletionFormat, reading: Reading) -> Record:
    """A request and an answer, each a text or a list of messages. Every answer of the completion is trained."""
    prompt = _required(row, "prompt", columns.prompt)
    turns = (Message("user", prompt),) if isinstance(prompt, str) else _messages(prompt, columns.prompt, Media())[0]
    turns = tuple(replace(turn, trained=False) for turn in turns)
    if columns.chosen is not None and columns.rejected is not None:
        return _pair(
            Conversation(turns),
            _side(_required(row, "chosen", columns.chosen), columns.chosen),
            _side(_required(row, "rejected", columns.rejected), columns.rejected),
            _margin(row, columns.margin, reading),
        )
    if columns.completion is None:
        return Conversation(turns)
    answer = _side(_required(row, "completion", columns.completion), columns.completion)
    return _judged(Conversation((*turns, *answer)), _optional(row, columns.label), reading)


def text(row: Row, columns: TextFormat, reading: Reading) -> Text:
    return Text(_text(_required(row, "text", columns.text), columns.text))


FORMATS: dict[str, Callable[..., Record]] = {
    "chat": chat,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": openai,
    "prompt_completion": prompt_completion,
    "text": text,
}


# Tagged messages ------------------------------------------------------------------------------------------------------


def _tagged(message: Any, columns: Tags, reading: Reading) -> Message:
    """One message by its tags. Raises BadRow for a role that the tags do not name."""
    if not isinstance(message, Mapping):
        raise BadRow(f"a message must be an object with {columns.role_tag} and {columns.content_tag}", _shown(message))
    tag = message.get(columns.role_tag)
    content = message.get(columns.content_tag)
    roles = {
        columns.user_tag: "user",
        columns.observation_tag: "tool",
        columns.system_tag: "system",
        columns.assistant_tag: "assistant",
        columns.function_tag: "function",
    }
    role: Any = roles.get(tag) if isinstance(tag, str) else None
    if role is None:
        known = ", ".join(str(name) for name in roles if name is not None)
        raise BadRow(f"a message's {columns.role_tag} must be one of {known}", f"got {_shown(tag)}")
    content = _text(content, f"a message's {columns.content_tag}")
    weight = _weight(message)
    if role != "function":
        return Message(role, content, trained=role == "assistant" and weight > 0, weight=weight)
    try:
        said, calls = parse_call_turn(content, thought=reading.thought, call_words=reading.call_words)
    except ValueError as error:
        raise BadRow("a message of tool calls must be JSON with names and arguments", f"{error}: {_shown(content)}") from None
    return Message("assistant", said, trained=weight > 0, weight=weight, tool_calls=calls)


def _tagged_with_calls(message: Any, columns: Tags, reading: Reading) -> Message:
    """One message whose calls may stand beside its text."""
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if calls and message.get(columns.role_tag) in (columns.assistant_tag, columns.function_tag):
        content = message.get(columns.content_tag)
        said = "" if content is None else _text(content, f"a message's {columns.content_tag}")
        weight = _weight(message)
        read = Message("assistant", said, trained=weight > 0, weight=weight, tool_calls=_calls(calls))
    else:
        read = _tagged(message, columns, reading)
    return replace(read, reasoning=_reasoning(message)) if read.role == "assistant" else read


def _alternating(
    row: Row, columns: Tags, reading: Reading, read: Callable[[Any, Tags, Reading], Message], *, several_results: bool
) -> Record:
    """The record of messages whose order is right: what the model is told and what it says in turn, ending with the latter."""
    column = _required(row, "messages", columns.messages)
    if not isinstance(column, list):
        raise BadRow(f"{columns.messages} must be a list of messages", _shown(column))
    messages = [read(message, columns, reading) for message in column]
    system = _optional_text(row, columns.system)
    if messages and messages[0].role == "system":
        system = messages.pop(0).content
    if not messages:
        raise BadRow("there are no messages")
    told_last = False
    for earlier, message in zip([None, *messages], messages, strict=False):
        if message.role == "system":
            raise BadRow("a system message must come first")
        follows_result = several_results and earlier is not None and earlier.role == message.role == "tool"
        if not follows_result and (message.role != "assistant") == told_last:
            raise BadRow("requests or tool results must take turns with answers or tool calls", f"{message.role} is out of turn")
        told_last = message.role != "assistant"
    tools = _optional(row, columns.tools)
    conversation = Conversation((*_system(system, tools), *messages), _tools(tools), _media(row, columns, reading))
    if columns.chosen is not None and columns.rejected is not None:
        if not told_last:
            raise BadRow("the messages before a pair of answers must end with a request")
        sides = []
        for name in (columns.chosen, columns.rejected):
            side = _required(row, name, name)
            answer = read(side, columns, reading)
            if answer.role != "assistant":
                raise BadRow("an answer of a pair must have the role of an answer", f"{name} is {_shown(side)}")
            sides.append((replace(answer, trained=True),))
        chosen, rejected = sides
        return Pair(conversation, chosen, rejected, _margin(row, columns.margin, reading))
    if told_last:
        raise BadRow("the messages must end with an answer")
    return _judged(conversation, _optional(row, columns.label), reading)


# {role, content} messages ---------------------------------------------------------------------------------------------


def _messages(column: Any, name: str, media: Media) -> tuple[tuple[Message, ...], Media]:
    if not isinstance(column, list) or not column:
        raise BadRow(f"{name} must be a list of messages", _shown(column))
    images = list(media.images)
    turns = tuple(_message(message, images) for message in column)
    return turns, replace(media, images=tuple(images))


def _message(message: Any, images: list[Any]) -> Message:
    if not isinstance(message, Mapping):
        raise BadRow("a message must be an object with role and content", _shown(message))
    role: Any = message.get("role")
    if role not in ROLES:
        raise BadRow(f"a message's role must be one of {', '.join(ROLES)}", f"got {_shown(role)}")
    calls = list(_calls(message.get("tool_calls") or ()))
    content, reasoning = message.get("content"), _reasoning(message)
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content, thoughts = _joined(content, calls, images)
        reasoning = thoughts if reasoning is None else reasoning
    weight = _weight(message)
    return Message(
        role=role,
        content=_text(content, "a message's content"),
        trained=role == "assistant" and weight > 0,
        weight=weight,
        reasoning=reasoning,
        tool_calls=tuple(calls),
    )


def _joined(parts: Sequence[Any], calls: list[Any], images: list[Any]) -> tuple[str, str | None]:
    """Text and thoughts of a content in typed parts. Calls and images are added to the lists; an image leaves a placeholder."""
    said, thoughts = "", None
    for part in parts:
        if not isinstance(part, Mapping):
            raise BadRow("a part of a message's content must be an object with a type", _shown(part))
        value = part.get(str(part.get("type")), part.get("value"))
        match part.get("type"):
            case "text":
                said += _text(value, "a text part")
            case "reasoning":
                thoughts = (thoughts or "") + _text(value, "a reasoning part")
            case "tool_call":
                calls += _calls(_parsed(value))
            case "image" | "image_url":
                said += "<image>"
                images.append(value.get("url") if isinstance(value, Mapping) else value)
            case other:
                raise BadRow("a part of a message's content has a type that is not read", f"got {_shown(other)}")
    return said, thoughts


def _parsed(value: Any) -> list[Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise BadRow("a tool_call part must be JSON", _shown(value)) from None
    return parsed if isinstance(parsed, list) else [parsed]


def _weight(message: Row) -> float:
    """Of an answer in the loss, 0 where it is not trained: what `train`, `weight` and `loss_weight` say together."""
    weight = 1.0
    for flag in ("train", "weight", "loss_weight"):
        value = message.get(flag)
        if value is None:
            continue
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise BadRow(f"a message's {flag} must be true, false or a number that is not negative", f"got {_shown(value)}")
        weight *= value
    return weight


def _reasoning(message: Row) -> str | None:
    reasoning = message.get("reasoning_content")
    return None if reasoning is None else _text(reasoning, "a message's reasoning_content")


def _calls(calls: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(calls, list | tuple):
        raise BadRow("tool_calls must be a list", _shown(calls))
    return tuple(_call(call) for call in calls)


def _call(call: Any) -> dict[str, Any]:
    """{name, arguments}, also where it is wrapped as {type: function, function: {...}} or holds its arguments as JSON text."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        call = call["function"]
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise BadRow("a tool call must have a name", _shown(call))
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow("a tool call's arguments must be a JSON object", _shown(call)) from None
    if not isinstance(arguments or {}, Mapping):
        raise BadRow("a tool call's arguments must be a JSON object", _shown(call))
    return {"name": call["name"], "arguments": dict(arguments or {})}


def _side(side: Any, name: str) -> tuple[Message, ...]:
    """One side of a pair, or a completion: a text, a message or a list of messages."""
    if isinstance(side, str):
        return (Message("assistant", side, trained=True),)
    return _messages([side] if isinstance(side, Mapping) else side, name, Media())[0]


def _pair(request: Conversation, chosen: tuple[Message, ...], rejected: tuple[Message, ...], margin: float) -> Pair:
    """What both sides start with is the prompt; each goes on with one answer."""
    start = len(request.messages)
    if not start or chosen[:start] != request.messages or rejected[:start] != request.messages:
        chosen, rejected = (*request.messages, *chosen), (*request.messages, *rejected)
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    prompt, answers = chosen[:common], (chosen[common:], rejected[common:])
    if not prompt:
        raise BadRow("the two sides of a pair must answer the same request")
    for answer in answers:
        if len(answer) != 1 or answer[0].role != "assistant":
            raise BadRow("each side of a pair must add one answer to a common request", f"roles {[turn.role for turn in answer]}")
    prompt = tuple(replace(message, trained=False) for message in prompt)
    chosen, rejected = ((replace(answer, trained=True),) for (answer,) in answers)
    return Pair(replace(request, messages=prompt), chosen, rejected, margin)


# What all have --------------------------------------------------------------------------------------------------------


WRITTEN_LABELS = {"true": True, "1": True, "false": False, "0": False}


def _judged(conversation: Conversation, label: Any, reading: Reading) -> Conversation | Labeled:
    """Labelled where the label is true or false; anything else is no label."""
    if reading.untyped and isinstance(label, str):
        label = WRITTEN_LABELS.get(label.strip().lower())
    return Labeled(conversation, desirable=label) if isinstance(label, bool) else conversation


def _margin(row: Row, column: str | None, reading: Reading) -> float:
    """0 where the row does not say. A column that is asked for must be there."""
    value = None if column is None else _required(row, "margin", column)
    if reading.untyped and isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            raise BadRow("a margin must be a number", f"got {_shown(value)}") from None
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise BadRow("a margin must be a number that is not negative", f"got {_shown(value)}")
    return float(value)


def _system(text: str, tools: Any) -> tuple[Message, ...]:
    """The system message, if any. Tools that are given but none (a JSON text of an empty list) make an empty one."""
    given = (isinstance(tools, str) and tools.strip()) or isinstance(tools, list)
    return (Message("system", text),) if text or (given and not _tools(tools)) else ()


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("the tools must be a JSON list", _shown(tools)) from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("the tools must be a list of objects", _shown(tools))
    return tuple(tools)


def _media(row: Row, columns: Columns, reading: Reading) -> Media:
    return Media(*(_references(_optional(row, name), reading) for name in (columns.images, columns.videos, columns.audios)))


def _references(column: Any, reading: Reading) -> tuple[Any, ...]:
    if not column:
        return ()
    return tuple(_reference(item, reading) for item in (column if isinstance(column, list) else [column]))


def _reference(item: Any, reading: Reading) -> Any:
    """A path is that of a file in media_dir, if there is one; a list is the frames of a video."""
    if isinstance(item, list):
        return [_reference(frame, reading) for frame in item]
    if isinstance(item, str) and reading.media_dir is not None and (path := Path(reading.media_dir, item)).is_file():
        return str(path)
    return item


def _required(row: Row, setting: str, column: str) -> Any:
    if column not in row:
        raise BadRow(f"there is no column {column!r} (data.format.{setting})", f"there are {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _optional(row: Row, column: str | None) -> Any:
    return None if column is None else row.get(column)


def _optional_text(row: Row, column: str | None) -> str:
    value = _optional(row, column)
    return "" if value is None else _text(value, f"{column}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} must be text", f"got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
