"""`export.format=ollama`: a GGUF file and the Modelfile that Ollama makes a model from.

Ollama renders conversations by a Go template of its own, not by the chat template in the file. What the chat template writes
around each turn is read from what it renders. If turns put together from that are not what it renders, it can't be said in the Go
template, and the export is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from raytune_llm.config.run import ExportRun
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.errors import ConfigError
from raytune_llm.export.gguf.file import gguf
from raytune_llm.export.source import Source
from raytune_llm.export.target import OnBytes, Target

MODELFILE = "Modelfile"
MAX_CONTEXT = 8192
"""The largest num_ctx: Ollama allocates its memory at once."""
Messages = Sequence[tuple[str, str]]
"""Roles and contents."""
SYSTEM, ASKED, ANSWERED, AGAIN = "a-system-text", "a-question", "an-answer", "another-question"
CONVERSATIONS: Sequence[Messages] = (
    (("user", "Hi"),),
    (("system", "Be brief."), ("user", "Hi {{ there }}")),
    (("system", "Be brief."), ("user", "One"), ("assistant", "1"), ("user", "Two"), ("assistant", "2\n3"), ("user", "Three")),
    (("user", "One"), ("assistant", "1"), ("user", "Two")),
)


@dataclass(frozen=True)
class Turns:
    """What a chat template writes before and after the content of each role."""

    around: dict[str, tuple[str, str]]
    default_system: str | None
    """The system text of a conversation that has none."""

    def rendered(self, messages: Messages) -> str:
        """As the Go template writes it, up to where the answer begins."""
        if self.default_system is not None and messages[0][0] != "system":
            messages = (("system", self.default_system), *messages)
        turns = [self.around[role][0] + content + self.around[role][1] for role, content in messages]
        return "".join(turns) + self.around["assistant"][0]

    def go_template(self) -> str:
        branches = [f'{{{{ if eq .Role "{role}" }}}}{_around(*texts)}{{{{ end }}}}' for role, texts in self.around.items()]
        return f"{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{_literal(self.around['assistant'][0])}"


def ollama(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError for a chat template that Ollama's can't say."""
    target = gguf(source, run)
    tokenizer: Any = load_tokenizer(str(source.beside or source.folder), needs_chat_template=False)
    turns = turns_of(tokenizer, str(source.beside or source.folder))
    stops = [tokenizer.convert_ids_to_tokens(id) for id in source.stop_ids or [tokenizer.eos_token_id]]
    context = min(source.config.max_position_embeddings, MAX_CONTEXT)

    def write(folder: Path, on_bytes: OnBytes) -> None:
        target.write(folder, on_bytes)
        (file,) = folder.glob("*.gguf")
        (folder / MODELFILE).write_text(modelfile(file.name, turns, stops, context), encoding="utf-8")

    return replace(target, write=write)


def modelfile(file: str, turns: Turns, stops: Sequence[str], context: int) -> str:
    lines = [f"FROM ./{file}", f'TEMPLATE """{turns.go_template()}"""']
    if turns.default_system:
        lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n"


def turns_of(tokenizer: Any, got: str) -> Turns:
    """Raises ConfigError where its chat template writes more than a text before and after each turn."""
    if tokenizer.chat_template is None:
        raise _unsaid("the tokenizer has none", got)
    begins = tokenizer.bos_token if _adds_bos(tokenizer) else ""

    def render(messages: Messages, *, asks: bool = True) -> str:
        given = [{"role": role, "content": content} for role, content in messages]
        text = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=asks)
        if not text.startswith(begins):
            raise _unsaid(f"it does not begin with {begins}, which llama.cpp puts before every text", got)
        return text.removeprefix(begins)

    try:
        turns = _found(render)
        for messages in CONVERSATIONS:
            if (expected := render(messages)) != turns.rendered(messages):
                raise _unsaid(f"it writes {expected!r}, and turns by themselves would be {turns.rendered(messages)!r}", got)
    except (TemplateError, ValueError) as error:
        raise _unsaid(f"it has no place for a system text, or parts of turns that depend on others ({error})", got) from None
    if '"""' in turns.go_template() + (turns.default_system or ""):
        raise _unsaid('it has """ in it', got)
    return turns


def _found(render: Any) -> Turns:
    """Raises ValueError where a part is not where it must be."""
    begun = (("system", SYSTEM), ("user", ASKED))
    answered = (*begun, ("assistant", ANSWERED))
    before_system, between, _ = _cut(render(begun), SYSTEM, ASKED)
    after_user = _cut(render(begun, asks=False), ASKED)[-1]
    before_answer = _without(_cut(render(begun), ASKED)[-1], start=after_user)
    after_answer = _cut(render(answered, asks=False), ANSWERED)[-1]
    before_user = _without(_cut(render((*answered, ("user", AGAIN))), ANSWERED, AGAIN)[1], start=after_answer)
    after_system = _without(between, end=before_user)
    alone = _cut(render((("user", ASKED),)), ASKED)[0]
    default = None if alone == before_user else _without(_without(alone, start=before_system), end=after_system + before_user)
    around = {
        "system": (before_system, after_system),
        "user": (before_user, after_user),
        "assistant": (before_answer, after_answer),
    }
    return Turns(around, default)


def _cut(text: str, *marks: str) -> list[str]:
    """What is before, between and after the marks."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"{mark} is not rendered")
        pieces.append(before)
    return [*pieces, text]


def _without(text: str, *, start: str = "", end: str = "") -> str:
    if not (text.startswith(start) and text.endswith(end) and len(text) >= len(start) + len(end)):
        raise ValueError(f"{start + end!r} is not in {text!r}")
    return text[len(start) : len(text) - len(end)]


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id


def _around(before: str, after: str) -> str:
    return f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}"


def _literal(text: str) -> str:
    """As a Go string, whose escapes are JSON's: white space beside it stays as it is."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _unsaid(why: str, got: str) -> ConfigError:
    fix = "Set export.format=gguf, and write a Modelfile by hand."
    return ConfigError("export.format", f"can't be ollama with this chat template: {why}", got=got, fix=fix)
