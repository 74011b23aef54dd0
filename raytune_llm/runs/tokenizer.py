"""The tokenizer of a run, with the chat template that its stage's rows need."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from raytune_llm.config.run import PrepareRun, TrainRun
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.templates.named import NamedTemplate
from raytune_llm.data.tokens.tokenizer import run_tokenizer


def tokenizer_of(run: TrainRun | PrepareRun) -> tuple[PreTrainedTokenizerFast, NamedTemplate | None]:
    """The tokenizer and chat template with which the run's rows are rendered. See run_tokenizer."""
    return run_tokenizer(run.model, run.data, needs_template=KINDS[run.stage.kind].renders_chat)
