"""Objects that consecutive runs in one process share: the tokenizer, open token stores, and the base model.

The trials of a sweep share a workspace. A single run has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from raytune_llm.config.run import TrainRun
from raytune_llm.data.templates.named import NamedTemplate
from raytune_llm.models.shared import SharedModel
from raytune_llm.runs.tokenizer import tokenizer_of

T = TypeVar("T")


class Workspace:
    def __init__(self, *, keeps_base: bool = False, checked: bool = False) -> None:
        """keeps_base: keep the frozen base for a later run. checked: its runs have already passed preflight.py."""
        self.checked = checked
        self.base = SharedModel() if keeps_base else None
        self._found: dict[str, Any] = {}

    def tokenizer_of(self, run: TrainRun) -> tuple[PreTrainedTokenizerFast, NamedTemplate | None]:
        return self.once("tokenizer", (run.model, run.data, run.stage.kind), lambda: tokenizer_of(run))

    def once(self, what: str, of: object, make: Callable[[], T]) -> T:
        """The result of `make`, cached by `what` and the repr of `of`."""
        key = f"{what} {of!r}"
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]
