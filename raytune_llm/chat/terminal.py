"""A conversation at a terminal: reads messages, shows answers, and stops them at Ctrl-C."""

from __future__ import annotations

import re
import select
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from raytune_llm.chat.client import Answer
from raytune_llm.chat.dialogue import Dialogue

PASTE_S = 0.03
"""Lines that arrive within this time of each other were pasted."""
FENCE = '"""'
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters, which would let a model's answer control the terminal."""


@dataclass
class Terminal:
    dialogue: Dialogue
    console: Console
    read: Callable[[str], str] = input
    hides_thoughts: bool = False

    def message(self) -> str | None:
        """The user's next message; pasted lines are one message. None: the input has ended."""
        call = self.dialogue.open_call
        who = self.dialogue.model if self.dialogue.model != self.dialogue.base else ""
        try:
            line = self.read(f"{'result of ' + call['function']['name'] if call else who}> ")
            if line.strip() == FENCE:
                return "\n".join(iter(lambda: self.read(". "), FENCE))
            if line.startswith("/"):
                return line
            lines = [line]
            while self._more_was_pasted():
                lines.append(self.read(""))
            return "\n".join(lines).strip("\n")
        except EOFError:
            return None

    def answer(self) -> None:
        """Stream and show the model's answer. Ctrl-C stops it."""
        answer = Answer()
        thinking = stopped = False
        pieces = self.dialogue.ask(answer)
        with closing(pieces):
            try:
                for kind, text in pieces:
                    if kind == "reasoning" and self.hides_thoughts:
                        continue
                    if thinking and kind == "content":
                        self.console.print("\n")
                    thinking = kind == "reasoning"
                    self.show(text, style="dim italic" if thinking else "")
            except KeyboardInterrupt:
                stopped = True
        for call in answer.calls:
            self.show(f"\n[calls {call['function']['name']}({call['function']['arguments']})]", style="yellow")
        self.console.print()
        self.console.print(Text(_figures(answer, stopped), style="dim"))

    def show(self, text: str, style: str = "") -> None:
        """Print text of the model. Control characters are replaced."""
        self.console.print(Text(CONTROLS.sub("\ufffd", text), style=style), end="", soft_wrap=True)

    def _more_was_pasted(self) -> bool:
        if not sys.stdin.isatty():
            return False
        with suppress(OSError, ValueError):
            return bool(select.select([sys.stdin], [], [], PASTE_S)[0])
        return False


def _figures(answer: Answer, stopped: bool) -> str:
    """`32 tokens, 21.3 tokens/s, the first after 0.12 s`, and why it ended."""
    parts = ["stopped"] if stopped else []
    parts += [] if answer.tokens is None else [f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"]
    parts += [] if answer.tokens_per_s is None else [f"{answer.tokens_per_s:.1f} tokens/s"]
    parts += [] if answer.first_s is None else [f"the first after {answer.first_s:.2f} s"]
    parts += ["cut at max_tokens"] if answer.finish == "length" else []
    return ", ".join(parts) or "no answer"
