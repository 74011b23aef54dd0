"""`export.format=ollama`: a GGUF file and the Modelfile that Ollama makes a model from.

Ollama renders conversations by a Go template of its own, not by the chat template in the file. It is put together from what the
chat template writes around each part of a conversation (written.py). Conversations are then rendered through both. Where the
texts differ, the export is refused. Where only those with tools or thoughts differ, the Go template has no tools or thoughts, and
Ollama refuses requests with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raytune_llm.config.run import ExportRun
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.export.gguf.file import gguf
from raytune_llm.export.ollama.go_template import Scope
from raytune_llm.export.ollama.prompts import ChatTemplate, Message, Prompt, Unsaid, answer, result, system, tool, user
from raytune_llm.export.ollama.written import Written, thinking_of, tools_of, written
from raytune_llm.export.source import Source
from raytune_llm.export.target import OnBytes, Target

MODELFILE = "Modelfile"
MAX_CONTEXT = 8192
"""The largest num_ctx: Ollama allocates its memory at once."""
SHOWN_CHARS = 40
"""Of two texts, before and after where they differ."""
Messages = Sequence[Message]
BRIEF = system("Be brief.")
PLAIN: Sequence[Messages] = (
    (user("Hi"),),
    (BRIEF, user("Hi {{ there }}")),
    (BRIEF, user("One"), answer("1"), user("Two"), answer("2\n3"), user("Three")),
    (user("One"), answer("1"), user("Two")),
)
WEATHER, SUM, CLOCK = tool("weather", "The weather in a town."), tool("sum", "a + b, if a > b"), tool("clock", "Tells the time.")
PARIS, LYON = ("weather", {"town": "Paris", "days": 2}), ("weather", {"town": "Lyon", "parts": ["sky", {"wind": None}]})
CALLED: Messages = (user("Paris?"), answer("", calls=[PARIS]), result('{"sky": "clear"}'))
REMARKED: Messages = (user("Paris?"), answer("I look.", calls=[PARIS]), result("clear\nand mild"))
CALLED_TWICE: Messages = (user("Both?"), answer("", calls=[PARIS, LYON]), result("clear"), result('"rain"'))
THOUGHT: Messages = (user("One"), answer("1", thought="It is\nfirst."))
THOUGHT_AND_CALLED: Messages = (user("Paris?"), answer("", calls=[PARIS], thought="It is a town."), result("clear"))


@dataclass(frozen=True)
class Said:
    """A chat template in Ollama's language."""

    written: Written
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Of tools and thinking, what is not in it, and why."""
    dated: bool = False
    """The chat template writes the day's date."""

    @property
    def go_template(self) -> str:
        return self.written.template().go()

    @property
    def notes(self) -> str:
        has = [what for what, part in (("tools", self.written.tools), ("thinking", self.written.thinking)) if part is not None]
        lines = [f"The Modelfile's template has {' and '.join(has)}." if has else ""]
        if self.written.tools is not None:
            lines.append("Ollama writes the JSON of tools and calls without spaces, whatever the chat template does.")
        if self.dated:
            lines.append("The date that the chat template writes is that of the export.")
        lines += [f"The Modelfile has no {what}. Of the chat template: {why}." for what, why in self.left_out.items()]
        return " ".join(filter(None, lines))


def ollama(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError for a chat template that Ollama's can't say."""
    target = gguf(source, run)
    tokenizer: Any = load_tokenizer(str(source.beside or source.folder), needs_chat_template=False)
    said = said_of(tokenizer, str(source.beside or source.folder))
    stops = [tokenizer.convert_ids_to_tokens(id) for id in source.stop_ids or [tokenizer.eos_token_id]]
    context = min(source.config.max_position_embeddings, MAX_CONTEXT)

    def write(folder: Path, on_bytes: OnBytes) -> None:
        target.write(folder, on_bytes)
        (file,) = folder.glob("*.gguf")
        (folder / MODELFILE).write_text(modelfile(file.name, said.go_template, stops, context), encoding="utf-8")

    return replace(target, write=write, notes="\n\n".join(filter(None, (target.notes, said.notes))))


def modelfile(file: str, go_template: str, stops: Sequence[str], context: int) -> str:
    lines = [f"FROM ./{file}", f'TEMPLATE """{go_template}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n"


def said_of(tokenizer: Any, got: str) -> Said:
    """Raises ConfigError where plain conversations can't be said."""
    fix = "Set export.format=gguf, and write a Modelfile by hand."
    rule = "can't be ollama with this chat template"
    if tokenizer.chat_template is None:
        raise ConfigError("export.format", f"{rule}: the tokenizer has none", got=got, fix=fix)
    template = ChatTemplate(tokenizer, tokenizer.bos_token if _adds_bos(tokenizer) else "")
    try:
        plain = written(template)
        _check(template, plain, map(Prompt, PLAIN))
    except Unsaid as unsaid:
        raise ConfigError("export.format", f"{rule}: {unsaid}", got=got, fix=fix) from None
    left_out: dict[str, str] = {}
    for what, find, prompts in (("tools", tools_of, _with_tools), ("thinking", thinking_of, _with_thoughts)):
        try:
            more = replace(plain, **{what: find(template, plain)})
            _check(template, more, prompts(more))
            plain = more
        except Unsaid as unsaid:
            left_out[what] = str(unsaid)
    return Said(plain, left_out, "strftime_now" in tokenizer.get_chat_template())


def prompts_of(known: Written) -> list[Prompt]:
    """The conversations that the Go template must render as the chat template does."""
    tools = [] if known.tools is None else _with_tools(known)
    return [*map(Prompt, PLAIN), *tools, *([] if known.thinking is None else _with_thoughts(known))]


def _with_tools(known: Written) -> Iterator[Prompt]:
    assert known.tools is not None
    again: Messages = (answer("Clear."), user("And Lyon?"))
    histories = [(user("Hi"),), CALLED, (*CALLED, *again), (*REMARKED, *again), REMARKED]
    if known.tools.several is not None:
        histories += [CALLED_TWICE, (*CALLED_TWICE, *again)]
    for history in histories:
        for tools in ((WEATHER,), (WEATHER, SUM, CLOCK)):
            yield Prompt(history, tools)
            yield Prompt((BRIEF, *history), tools)
    yield from map(Prompt, PLAIN)


def _with_thoughts(known: Written) -> Iterator[Prompt]:
    for thinking in (None, True, False):
        for history in (*PLAIN, (*THOUGHT, user("Two")), (BRIEF, *THOUGHT, user("Two"), *THOUGHT[1:], user("Three"))):
            yield Prompt(history, thinking=thinking)
        if known.tools is not None:
            called = THOUGHT_AND_CALLED
            for history in (called, (*THOUGHT, *called), (*called, *THOUGHT[1:], user("Two"))):
                yield Prompt(history, (WEATHER,), thinking)


def _check(template: ChatTemplate, known: Written, prompts: Iterable[Prompt]) -> None:
    """Raises Unsaid where the texts differ in more than the spaces of JSON."""
    node = known.template()
    if '"""' in node.go():
        raise Unsaid('it has """ in it')
    for prompt in prompts:
        values = prompt.for_ollama()
        ours, theirs = node.text(Scope(values, values)), template.text(prompt)
        ours, theirs = without_spaces(ours), without_spaces(theirs)
        if ours != theirs:
            raise Unsaid(
                f"it writes {_from_difference(theirs, ours)}, turns by themselves would be {_from_difference(ours, theirs)}"
            )


def _from_difference(text: str, other: str) -> str:
    """The part of `text` around its first difference from `other`, for an error."""
    same = next((n for n, (one, two) in enumerate(zip(text, other, strict=False)) if one != two), min(len(text), len(other)))
    start = max(0, same - SHOWN_CHARS)
    return f"{'...' if start else ''}{text[start : same + SHOWN_CHARS]!r}"


def without_spaces(text: str) -> str:
    """The text with each JSON object in it written as Ollama writes it: without spaces, its keys sorted."""
    pieces = []
    at = 0
    while (found := text.find("{", at)) >= 0:
        pieces.append(text[at:found])
        try:
            value, at = json.JSONDecoder().raw_decode(text, found)
            pieces.append(json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True))
        except ValueError:
            pieces.append("{")
            at = found + 1
    return "".join([*pieces, text[at:]])


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
