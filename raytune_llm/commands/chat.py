"""`chat`: a conversation in the terminal; if standard input is piped, one answer to all of it."""

from __future__ import annotations

import sys
from contextlib import suppress

from rich.console import Console
from rich.text import Text

from raytune_llm.chat.client import Answer
from raytune_llm.chat.open import open_dialogue
from raytune_llm.chat.slash import COMMANDS, Leave, run_command
from raytune_llm.chat.terminal import Terminal
from raytune_llm.config.paths import with_absolute_paths
from raytune_llm.config.run import ChatRun
from raytune_llm.errors import ConfigError, DataError, UserError


def main(run: ChatRun) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _answer_once(run)
    console = Console(highlight=False)
    loading = console.status(f"loading {run.model.path}" if run.chat.url is None else f"asking {run.chat.url}")
    loading.start()
    try:
        with open_dialogue(with_absolute_paths(run)) as dialogue:
            loading.stop()
            names = ", ".join(model.id for model in dialogue.models[1:])
            console.print(Text(f"{dialogue.base}{', adapters: ' + names if names else ''}. /help lists the commands."))
            _complete_commands()
            _converse(Terminal(dialogue, console))
    finally:
        loading.stop()
    return 0


def _answer_once(run: ChatRun) -> int:
    """Nothing but the answer's text goes to standard output."""
    try:
        said = sys.stdin.read().strip("\n")
    except UnicodeDecodeError as error:
        raise DataError("standard input", f"must be text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not said.strip():
        raise ConfigError(
            "standard input", "must hold a message", got="nothing", fix='For example, echo "hello" | raytune-llm chat.'
        )
    with open_dialogue(with_absolute_paths(run)) as dialogue:
        dialogue.say(said)
        try:
            for kind, text in dialogue.ask(Answer()):
                if kind == "content":
                    print(text, end="", flush=True)
            print()
        except BrokenPipeError:  # the reading program has ended
            sys.stdout = None
    return 0


def _converse(terminal: Terminal) -> None:
    while True:
        try:
            text = terminal.message()
            if text is None:
                terminal.console.print()
                return
            if text.startswith("/"):
                run_command(terminal, text)
            elif text.strip():
                _answered(terminal, text)
        except Leave:
            return
        except KeyboardInterrupt:
            terminal.console.print("\nCtrl-D or /exit ends the chat", style="dim")
        except UserError as error:
            terminal.console.print(Text(str(error), style="red"))


def _answered(terminal: Terminal, text: str) -> None:
    dialogue = terminal.dialogue
    with dialogue.unchanged_by_errors():
        dialogue.say(text)
        if dialogue.open_call is None:  # else the user is asked for the call's result first
            terminal.answer()


def _complete_commands() -> None:
    """Let the tab key complete commands and the arrow keys recall earlier messages."""
    with suppress(ImportError):
        import readline

        def complete(text: str, state: int) -> str | None:
            known = [f"/{name} " for name in COMMANDS if text and f"/{name}".startswith(text)]
            return known[state] if state < len(known) else None

        readline.set_completer_delims("")
        readline.set_completer(complete)
        readline.parse_and_bind("tab: complete")
