"""`engine=` -> the engine that a replica, or this process, serves with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from raytune_llm import packaged
from raytune_llm.config.run import ServeRun
from raytune_llm.data.templates.named import apply_to_tokenizer, load, stop_tokens
from raytune_llm.data.tokens.tokenizer import load_tokenizer
from raytune_llm.engines.engine import Engine
from raytune_llm.engines.native.build import Serving, native_engine
from raytune_llm.errors import ConfigError, UserError
from raytune_llm.models.build import choose_precision
from raytune_llm.models.generation_config import end_ids_of
from raytune_llm.models.load import load_config
from raytune_llm.serve.backend import ModelFacts

ENGINES: dict[str, Callable[[Any, Serving], Engine]] = {"native": native_engine}


def build_engine(run: ServeRun) -> tuple[Engine, ModelFacts]:
    serving = _serving(run)
    engine = ENGINES[run.engine.name](run.engine, serving)
    text: Any = serving.config.get_text_config()
    facts = ModelFacts(name=base_name(run), max_length=engine.max_length, hidden_size=text.hidden_size, scores=serving.scores)
    try:
        for name, folder in run.serve.adapters.items():
            engine.add_adapter(name, folder)
    except UserError:
        engine.close()
        raise
    return engine, facts


def base_name(run: ServeRun) -> str:
    return run.serve.base_name or Path(run.model.path or "base").name


def tokenizer_of(run: ServeRun) -> tuple[Any, list[int]]:
    """With the chat template that it is asked by, and the tokens that end an answer."""
    model = run.model
    tokenizer = load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        kind=model.tokenizer,
        needs_chat_template=False,
    )
    ends = [str(tokenizer.eos_token)] if tokenizer.eos_token else []
    if run.serve.template is not None:
        template = load(run.serve.template)
        apply_to_tokenizer(tokenizer, template)
        ends = list(stop_tokens(tokenizer, template))
    return tokenizer, [int(tokenizer.convert_tokens_to_ids(token)) for token in ends]  # type: ignore[arg-type]


def _serving(run: ServeRun) -> Serving:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute, _ = choose_precision(run.serve.precision, device)
    tokenizer, ends = tokenizer_of(run)
    model = run.model
    config = load_config(model.path, model.config, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if _scores(config):
        raise ConfigError(
            "model.path", "must be a model that writes text: reward models are not served yet", got=str(model.path),
            fix="Score with transformers or PEFT, which load it.",
        )  # fmt: skip
    return Serving(
        model=model,
        quantization=run.quantization,
        config=config,
        tokenizer=tokenizer,
        end_ids=sorted({*ends, *_configured_ends(model.path)}),
        compute=compute,
        device=device,
        max_length=run.serve.max_length,
        max_adapters=run.serve.max_adapters,
        max_rank=run.serve.max_rank,
        max_host_adapters=run.serve.max_host_adapters,
        scores=_scores(config),
    )


def _configured_ends(path: str | None) -> list[int]:
    """That the model's generation config names: training writes there what it taught answers to end with."""
    if path is None:
        return []
    try:
        return end_ids_of(GenerationConfig.from_pretrained(packaged.resolve(path)))
    except OSError:
        return []


def _scores(config: PretrainedConfig) -> bool:
    """A reward model: its files hold a score head in place of the language model's."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())
