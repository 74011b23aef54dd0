"""`engine=` -> the engine that a replica, or this process, serves with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from raytune_llm import packaged
from raytune_llm.config.adapter import SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.serve import EngineConfig, ServedModels
from raytune_llm.data.templates.named import apply_to_tokenizer, load
from raytune_llm.data.tokens.tokenizer import load_tokenizer, stop_ids
from raytune_llm.engines.apart import apart
from raytune_llm.engines.engine import Engine
from raytune_llm.engines.hf_runner import hf_engine
from raytune_llm.engines.native.build import Serving, native_engine
from raytune_llm.engines.sglang_host import check_sglang, sglang_engine
from raytune_llm.engines.vllm_host import check_vllm, vllm_engine
from raytune_llm.errors import ConfigError, UserError
from raytune_llm.models.adapters import UNMIXED_FIX, other_base, unmixed
from raytune_llm.models.adapters.saved import task_of, token_ids_of
from raytune_llm.models.build import choose_precision
from raytune_llm.models.generation_config import end_ids_of, read_generation_config
from raytune_llm.models.load import load_config
from raytune_llm.models.score_head import has_separate_head
from raytune_llm.serve.backend import ModelFacts

SWITCH_S = 0.0005
"""How long a thread keeps the interpreter while another waits for it, at most; Python's default is 5 ms. An engine's thread waits
for it after each of a step's operations, while the server sends the last step's tokens, and a step of a GPU takes about as long
as Python's default. On two cores, whose steps take longer, `scripts/bench serve_waits` finds no difference beyond its noise."""


class EngineKind(NamedTuple):
    build: Callable[[Any, Serving], Engine]
    check: Callable[[Any, ModelConfig, QuantizationConfig, ServedModels], None] = lambda *settings: None
    """Raises a UserError for what can be known to fail before anything is loaded, by the engine's settings and the model's."""
    unmixed: Callable[[str, str], str | None] = lambda folder, setting: None
    """What an adapter's folder has that the engine computes only in the model itself, for all requests; None: nothing."""


ENGINES: dict[str, EngineKind] = {
    "native": EngineKind(native_engine, unmixed=unmixed),
    "hf": EngineKind(hf_engine),
    "vllm": EngineKind(vllm_engine, check_vllm),
    "sglang": EngineKind(sglang_engine, check_sglang),
}


def build_engine(
    model: ModelConfig, quantization: QuantizationConfig, engine_settings: EngineConfig, served: ServedModels
) -> tuple[Engine, ModelFacts]:
    """The engine with its adapters, and facts about its model. An adapter that changes the model itself is served alone, under
    its own name."""
    kind = ENGINES[engine_settings.name]
    kind.check(engine_settings, model, quantization, served)
    alone = lone_adapter(served, engine_settings)
    serving = _serving(model, quantization, served, alone)
    sys.setswitchinterval(SWITCH_S)
    engine = apart(lambda: kind.build(engine_settings, serving))
    text: Any = serving.config.get_text_config()
    facts = ModelFacts(
        name=base_name(model, served) if alone is None else alone.name,
        adapter_of=None if alone is None else base_name(model, served),
        max_length=engine.max_length,
        hidden_size=text.hidden_size,
        scores=serving.scores,
        keeps_seeds=engine_settings.keeps_seeds,
    )
    for name, folder in served.adapters.items() if alone is None else ():
        try:
            engine.add_adapter(name, folder)
        except UserError as error:
            engine.close()
            if not isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{served.setting}.{name}", error.rule, got=error.got, fix=error.fix) from None
    return engine, facts


def check_names(model: ModelConfig, served: ServedModels) -> None:
    """Raises ConfigError for an adapter under the name of the base, which would answer in its place."""
    if (name := base_name(model, served)) in served.adapters:
        fix = f"Choose another one, or set {served.setting.partition('.')[0]}.base_name."
        raise ConfigError(served.setting, "must not hold the base's name", got=name, fix=fix)


@dataclass(frozen=True)
class LoneAdapter:
    """An adapter that changes the model itself, so that no other can be beside it."""

    name: str
    source: SavedAdapter
    scores: bool
    """It makes the base a reward model."""
    token_ids: list[int]
    """Tokens that the base lacks."""
    why: str
    """Why nothing is beside it, to follow its name."""
    fix: str
    """What to do where something has to be."""


def lone_adapter(served: ServedModels, engine_settings: EngineConfig) -> LoneAdapter | None:
    """The adapter that must be served alone, if there is one. Raises ConfigError if there are others beside it."""
    for name, folder in served.adapters.items():
        setting = f"{served.setting}.{name}"
        scores = task_of(folder, setting) == "SEQ_CLS" or has_separate_head(folder)
        token_ids = token_ids_of(folder, setting)
        more = None if scores or token_ids else ENGINES[engine_settings.name].unmixed(folder, setting)
        fix = "Name it in a separate command."
        if scores:
            why = "whose head no other has: it is a reward model's"
        elif token_ids:
            why = "which has tokens that no other has"
        elif more is not None:
            why, fix = f"which can't share a batch with others: it is {more}", UNMIXED_FIX
        else:
            continue
        if len(served.adapters) > 1:
            raise ConfigError(served.setting, f"must be {name} alone, {why}", got=sorted(served.adapters), fix=fix)
        return LoneAdapter(name, SavedAdapter(path=folder, setting=setting), scores, token_ids, why, fix)
    return None


def check_base(served: ServedModels, engine_settings: EngineConfig, setting: str) -> None:
    """Raises ConfigError, naming the setting, if the model without an adapter can't answer beside the adapters."""
    if (alone := lone_adapter(served, engine_settings)) is not None:
        rule = f"must be false beside {alone.name}, {alone.why}"
        raise ConfigError(setting, rule, got=True, fix=alone.fix)


def other_bases(model: ModelConfig, served: ServedModels) -> list[str]:
    """Warnings about adapters that were trained on another model."""
    said = (other_base(folder, f"{served.setting}.{name}", model.base_name) for name, folder in served.adapters.items())
    return [line for line in said if line is not None]


def base_name(model: ModelConfig, served: ServedModels) -> str:
    return served.base_name or Path(model.path or "base").name


def tokenizer_of(model: ModelConfig, served: ServedModels) -> tuple[Any, list[int]]:
    """The tokenizer with its chat template, and the tokens that end an answer. An adapter that adds tokens brings its own."""
    named = served.adapters.items()
    of_adapter = next((folder for name, folder in named if token_ids_of(folder, f"{served.setting}.{name}")), None)
    tokenizer = load_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        kind=model.tokenizer if of_adapter is None else of_adapter,
        needs_chat_template=False,
    )
    template = None if served.template is None else load(served.template)
    if template is not None:
        apply_to_tokenizer(tokenizer, template)
    return tokenizer, stop_ids(tokenizer, template)


def check_servable(
    model: ModelConfig, quantization: QuantizationConfig, engine_settings: EngineConfig, served: ServedModels
) -> None:
    """Raises the UserError with which a replica elsewhere would refuse the settings, as far as it is known without weights."""
    ENGINES[engine_settings.name].check(engine_settings, model, quantization, served)
    alone = lone_adapter(served, engine_settings)
    _, ends = tokenizer_of(model, served)
    _check_template(ends, load_config(model.path, model.config, **model.config_options), served, alone)
    _configured_ends(model.path)


def _serving(model: ModelConfig, quantization: QuantizationConfig, served: ServedModels, alone: LoneAdapter | None) -> Serving:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute, _ = choose_precision(served.precision, device)
    tokenizer, ends = tokenizer_of(model, served)
    config = load_config(model.path, model.config, **model.config_options)
    _check_template(ends, config, served, alone)
    source = alone.source.path if alone is not None else model.path and packaged.resolve(model.path)
    head = source if source is not None and has_separate_head(source) else None
    return Serving(
        model=model,
        quantization=quantization,
        config=config,
        tokenizer=tokenizer,
        end_ids=sorted({*ends, *_configured_ends(model.path)}),
        compute=compute,
        device=device,
        max_length=served.max_length,
        max_adapters=served.max_adapters,
        max_rank=served.max_rank,
        max_host_adapters=served.max_host_adapters,
        scores=head is not None or (_scores(config) if alone is None else alone.scores),
        adapter=None if alone is None else alone.source,
        adapter_name=None if alone is None else alone.name,
        new_ids=() if alone is None else alone.token_ids,
        head=head,
    )


def _check_template(ends: list[int], config: PretrainedConfig, served: ServedModels, alone: LoneAdapter | None) -> None:
    """Raises ConfigError where the model has no embedding for a token that the template ends answers with."""
    text: Any = config.get_text_config()
    rows = max([text.vocab_size, *(id + 1 for id in (alone.token_ids if alone is not None else ()))])
    if served.template is not None and max(ends, default=0) >= rows:
        rule = f"must be a template whose special tokens are among the model's {rows}"
        fix = "Take the template that the model was trained with."
        raise ConfigError(f"{served.setting.partition('.')[0]}.template", rule, got=served.template, fix=fix)


def _configured_ends(path: str | None) -> list[int]:
    """The end tokens in the model's generation config: training writes those there that it taught."""
    return end_ids_of(read_generation_config(path))


def _scores(config: PretrainedConfig) -> bool:
    """A reward model: its files hold a score head in place of the language model's."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())
