"""What a chat template puts around a system text, a request and an answer: found by rendering placeholders.

For comparing a tokenizer's own template with a named one, when a LLaMA-Factory run that named none is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raytune_llm.errors import ConfigError

CONTENT = "{{content}}"


@dataclass(frozen=True, slots=True)
class Slots:
    """Texts that hold {{content}}. The user's ends with what asks for an answer."""

    system: str
    user: str
    assistant: str
    default_system: str
    reasons: bool
    """The template writes thoughts of its own into answers; the slot is without them."""


def find_slots(render: Callable[[Sequence[dict[str, str]], bool], str], *, prefix: str = "") -> Slots:
    """`render(messages, add_generation_prompt)` gives text, which starts with `prefix`, what the tokenizer puts before anything.

    A text that the template writes before everything belongs to the system slot and to the user slot.
    """

    def text_of(*turns: tuple[str, str], asks: bool) -> str:
        return render([{"role": role, "content": content} for role, content in turns], asks).removeprefix(prefix)

    system = _slot("system text", text_of(("system", CONTENT), asks=False))
    without_system = text_of(("system", ""), ("user", CONTENT), asks=True)
    user = text_of(("user", CONTENT), asks=True)
    assistant = text_of(("user", CONTENT), ("assistant", CONTENT), asks=False)[len(user) :]
    reasons = "<think>" in assistant
    assistant = assistant.replace("<think>", "").replace("</think>", "").lstrip("\n")
    default_system = ""
    if (added := len(user) - len(without_system)) > 0:
        start = system.index(CONTENT)
        default_system = user[start : start + added]
        user = user.removeprefix(system.replace(CONTENT, default_system, 1))
    return Slots(system, _slot("request", user), _slot("answer", assistant), default_system, reasons)


def _slot(what: str, text: str) -> str:
    if CONTENT not in text:
        raise ConfigError(
            "the chat template", f"must write a {what} as it is", got=text, remedy="Name a template: data.template."
        )
    return text
