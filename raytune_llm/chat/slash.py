"""The commands of a conversation, which start with a slash."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from rich.live import Live
from rich.table import Table
from rich.text import Text

from raytune_llm.chat.client import Answer
from raytune_llm.chat.dialogue import Dialogue
from raytune_llm.chat.terminal import CONTROLS, Terminal
from raytune_llm.config.paths import expanded
from raytune_llm.errors import ConfigError

REFRESH_PER_S = 8
MAX_COMPARED = 8


class Leave(Exception):
    """The user ends the conversation."""


class SlashCommand(NamedTuple):
    argument: str
    does: str
    run: Callable[[Terminal, str], None]


def run_command(terminal: Terminal, line: str) -> None:
    """Run a command line such as "/set top_p 0.9". Raises UserError if it is wrong, and Leave."""
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        near = [known for known in COMMANDS if name and known.startswith(name)]
        if len(near) != 1:
            raise ConfigError("the command", f"must be one of {', '.join('/' + known for known in COMMANDS)}", got=line)
        name = near[0]
    COMMANDS[name].run(terminal, argument.strip())


def _adapter(terminal: Terminal, name: str) -> None:
    dialogue = terminal.dialogue
    dialogue.refresh()
    if name:
        dialogue.use(name)
        return
    for model in dialogue.models:
        terminal.console.print(
            Text(f"{'*' if model.id == dialogue.model else ' '} {model.id}{'' if model.parent else ' (base)'}")
        )


def _compare(terminal: Terminal, text: str) -> None:
    """Show the answers of the base model and the adapters side by side, generated at once, without changing the conversation."""
    dialogue = terminal.dialogue
    question = text or dialogue.question
    if question is None:
        raise ConfigError("/compare", "needs a question", fix="For example, /compare What is a fox?")
    dialogue.refresh()
    request = _request(dialogue, question, is_new=bool(text))
    names = list(dict.fromkeys([dialogue.base, dialogue.model, *(model.id for model in dialogue.models)]))[:MAX_COMPARED]
    answers = {name: Answer() for name in names}
    stop = threading.Event()

    def fill(name: str) -> None:
        with closing(dialogue.client.stream(answers[name], {**request, "model": name})) as pieces:
            for _ in pieces:
                if stop.is_set():
                    return

    with Live(get_renderable=lambda: _beside(answers), console=terminal.console, refresh_per_second=REFRESH_PER_S):
        with ThreadPoolExecutor(len(names)) as pool:
            waiting = [pool.submit(fill, name) for name in names]
            try:
                for one in waiting:
                    one.result()
            except KeyboardInterrupt:
                pass
            finally:
                stop.set()


def _request(dialogue: Dialogue, question: str, *, is_new: bool) -> dict:
    """The body of a request in which the question is the last message. is_new: it is not in the conversation yet."""
    body = dialogue.request(dialogue.model)
    messages = [*body["messages"], {"role": "user", "content": question}] if is_new else list(body["messages"])
    while messages[-1]["role"] == "assistant":
        messages.pop()
    return {**body, "messages": messages}


def _beside(answers: dict[str, Answer]) -> Table:
    table = Table(expand=True, show_lines=False)
    for name, answer in answers.items():
        speed = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f} tokens/s"
        table.add_column(Text(name), footer=Text(speed, style="dim"), ratio=1, overflow="fold")
    table.show_footer = True
    table.add_row(*(Text(CONTROLS.sub("\ufffd", answer.text)) for answer in answers.values()))
    return table


def _system(terminal: Terminal, text: str) -> None:
    if not text:
        terminal.console.print(Text(terminal.dialogue.system or "no system message"))
        return
    terminal.dialogue.system = None if text == "none" else text


def _set(terminal: Terminal, argument: str) -> None:
    dialogue = terminal.dialogue
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        settings = [f"{name}={value}" for name, value in dialogue.settings.items()] or ["all as the server has them"]
        terminal.console.print(Text("  ".join(settings)))
        return
    dialogue.set(name, value.strip())


def _think(terminal: Terminal, argument: str) -> None:
    if argument not in ("on", "off", "hide"):
        raise ConfigError("/think", "must be followed by on, off or hide", got=argument or "nothing")
    terminal.hides_thoughts = argument == "hide"
    if argument != "hide":
        terminal.dialogue.thinking = argument == "on"


def _tools(terminal: Terminal, file: str) -> None:
    dialogue = terminal.dialogue
    if file == "none":
        dialogue.tools = []
    elif file:
        dialogue.load_tools(Path(file))
    terminal.console.print(Text(", ".join(tool["function"]["name"] for tool in dialogue.tools) or "no tools"))


def _retry(terminal: Terminal, _: str) -> None:
    with terminal.dialogue.unchanged_by_errors():
        if not terminal.dialogue.remove_answer():
            raise ConfigError("/retry", "needs an earlier question", fix="Say something first.")
        terminal.answer()


def _undo(terminal: Terminal, _: str) -> None:
    if not terminal.dialogue.undo():
        raise ConfigError("/undo", "needs an earlier question", fix="There is nothing to undo.")


def _save(terminal: Terminal, file: str) -> None:
    terminal.dialogue.save(_file("/save", file))


def _load(terminal: Terminal, file: str) -> None:
    terminal.dialogue.load(_file("/load", file))
    for message in terminal.dialogue.messages:
        terminal.show(f"{message['role']}: {message.get('content') or ''}\n", style="dim")


def _tokens(terminal: Terminal, _: str) -> None:
    prompt = terminal.dialogue.prompt()
    of = "" if prompt.max_length is None else f" of {prompt.max_length}"
    terminal.console.print(Text(f"the prompt has {prompt.tokens}{of} tokens"))


def _prompt(terminal: Terminal, _: str) -> None:
    terminal.show(terminal.dialogue.prompt().text)
    terminal.console.print()


def _help(terminal: Terminal, _: str) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"/{name} {command.argument}".rstrip()), Text(command.does))
    table.add_row('"""', Text("begins and ends a message of several lines; pasted lines need none"))
    table.add_row("Ctrl-C", Text("stops an answer; Ctrl-D leaves"))
    terminal.console.print(table)


def _exit(terminal: Terminal, _: str) -> None:
    raise Leave


def _file(command: str, file: str) -> Path:
    if not file:
        raise ConfigError(command, "needs a file", fix=f"For example, {command} talk.json")
    return expanded(file)


COMMANDS = {
    "adapter": SlashCommand("NAME|none", "who answers: an adapter, or the base; alone: a list", _adapter),
    "compare": SlashCommand("[TEXT]", "base beside adapters, to this text or to the last question", _compare),
    "system": SlashCommand("TEXT|none", "the system message", _system),
    "set": SlashCommand("NAME VALUE", "temperature, top_p, max_tokens, seed, ...; alone: a list", _set),
    "think": SlashCommand("on|off|hide", "whether thoughts come before answers, and are shown", _think),
    "tools": SlashCommand("FILE|none", "tools that may be called, a JSON list; results are asked of you", _tools),
    "retry": SlashCommand("", "another answer to the last question", _retry),
    "undo": SlashCommand("", "take the last question and its answer back", _undo),
    "save": SlashCommand("FILE", "the conversation, as a row that data=openai trains on", _save),
    "load": SlashCommand("FILE", "a conversation that was saved", _load),
    "tokens": SlashCommand("", "how long the prompt is", _tokens),
    "prompt": SlashCommand("", "the text that the model is asked with", _prompt),
    "help": SlashCommand("", "this", _help),
    "exit": SlashCommand("", "leave", _exit),
}
