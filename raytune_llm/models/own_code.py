"""Models that come with Python code of their own (model.trust_remote_code)."""

from __future__ import annotations

import inspect

from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, get_class_from_dynamic_module

from raytune_llm.errors import ConfigError


def own_class(config: PretrainedConfig, auto: str = "AutoModelForCausalLM") -> type[PreTrainedModel] | None:
    """The class in a model's own code for one of transformers' auto classes, or None. The config is of the model's own class only
    if the code is trusted."""
    reference = (getattr(config, "auto_map", None) or {}).get(auto) if has_own_code(type(config)) else None
    return None if reference is None else get_class_from_dynamic_module(reference, config.name_or_path or "")


def has_own_code(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def check_own_code(model: PreTrainedModel) -> None:
    """Raises ConfigError if a model's own code lacks attributes or arguments that are used here. transformers' models have
    them."""
    if not has_own_code(type(model)):
        return
    lacking = _lacking(model)
    if lacking is not None:
        raise ConfigError(
            "model.path",
            f"must be a model whose code has what transformers' own models have: {type(model).__name__} has {lacking}",
            got=model.config.name_or_path,
            fix="Choose one that transformers has, or add it to the code.",
        )


def _lacking(model: PreTrainedModel) -> str | None:
    backbone = model.base_model
    if backbone is model:
        return f"no backbone under its base_model_prefix, {model.base_model_prefix!r}"
    if "inputs_embeds" not in inspect.signature(backbone.forward).parameters:
        return f"a backbone, {type(backbone).__name__}, that takes no inputs_embeds"
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = None
    if embeddings is None:
        return "no get_input_embeddings()"
    return None if model.get_output_embeddings() is not None else "no get_output_embeddings()"
