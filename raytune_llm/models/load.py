"""Loads a transformers model from a folder, the hub or only a config."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from raytune_llm import packaged
from raytune_llm.errors import ConfigError, first_line, last_line
from raytune_llm.finished import check_unchanged
from raytune_llm.models.attention.isolation import first_chunk
from raytune_llm.models.layers import largest
from raytune_llm.models.longer import with_positions
from raytune_llm.models.multimodal import TRAINED_ON_TEXT, is_multimodal, leave_other_media_out
from raytune_llm.models.own_code import own_class
from raytune_llm.models.quantization.prequantized import unpacked
from raytune_llm.models.stored import Files, an_adapter, files_of, model_in_files, other_shape
from raytune_llm.remote_code import announce

ROPE = ("rope_theta", "rope_scaling")
"""Old names of entries of rope_parameters."""
UNREADABLE = (OSError, SafetensorError, UnpicklingError, BadZipFile, EOFError, ValueError, TypeError, KeyError, RecursionError)
"""Errors that reading damaged weight files raises."""
MAX_HASHED_BYTES = 1 << 30
"""Files of a finished run's model are compared with their hashes up to this size."""
MAX_LAYERS = 1_000
"""A limit beyond any real model; a model of this size is built on the meta device within seconds."""


def load_config(
    path: str | None,
    changes: Mapping[str, Any],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    positions: int | None = None,
    rope_scaling: str | None = None,
) -> PretrainedConfig:
    """The model's own config with the changes; without a path, a config of only the changes. positions: the minimum that the
    model must have; if it has fewer, rope_scaling scales them."""
    _check_values(changes)
    found = _of_changes_alone(changes) if path is None else _changed_of(path, changes, revision, trust_remote_code)
    return found if positions is None or rope_scaling is None else with_positions(found, positions, rope_scaling)


def _changed_of(path: str, changes: Mapping[str, Any], revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    folder = packaged.resolve(path)
    check_unchanged(Path(folder), "model.path", max_bytes=MAX_HASHED_BYTES)
    try:
        if trust_remote_code:
            announce(folder, revision)
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds of errors for a damaged config.json
        if (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file():
            raise an_adapter(path) from None
        if not trust_remote_code and "trust_remote_code" in str(error):
            rule = "must be a model that transformers has: this one comes with code of its own, which is not run"
            raise ConfigError("model.path", rule, got=path, fix="Read it, and set model.trust_remote_code=true.") from None
        raise _unreachable(path, error) from None
    return unpacked(_changed(config, changes) if changes else config, path)


UNREAD = {
    "quantization_config": "Set quantization (bnb_nf4, fp8, ...).",
    "auto_map": "Set model.path to the folder with the code, and model.trust_remote_code=true.",
    "architectures": "Leave it out: the model's class follows from model_type and the stage.",
    "transformers_version": "Leave it out.",
    "_name_or_path": "Set model.path.",
}
"""Entries that transformers accepts for every model but that have no effect here -> what to do instead."""


def _check_values(changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        # every layer is built, and lists have an entry for each
        if key.endswith("layers") and isinstance(value, int) and value > MAX_LAYERS:
            raise ConfigError(f"model.config.{key}", f"must be at most {MAX_LAYERS:,}", got=value, fix="Lower it.")
        for name, number in _numbers(f"model.config.{key}", value):
            if not math.isfinite(number):
                raise ConfigError(name, "must be a finite number", got=number)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Floats in the value, each with its dotted name."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(name, item)


def _of_changes_alone(changes: Mapping[str, Any]) -> PretrainedConfig:
    entries = dict(changes)
    try:
        kind = entries.pop("model_type")
        plain = AutoConfig.for_model(kind)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            "model.config.model_type", "must be one that transformers has", got=changes.get("model_type")
        ) from error
    _check_known(plain, entries)
    with _accepted(changes):
        config = AutoConfig.for_model(kind, **entries)
    _check_heads(config)
    return config


def _check_known(config: PretrainedConfig, changes: Mapping[str, Any]) -> None:
    """Raises ConfigError for an entry that the config's class does not have, since it would have no effect."""
    values, kind = config.to_dict(), type(config)
    known = {*values, *(name for name in dir(kind) if not callable(getattr(kind, name))), *getattr(config, "attribute_map", {})}
    for key, value in changes.items():
        if key in UNREAD:
            raise ConfigError(f"model.config.{key}", "is not read here", got=value, fix=UNREAD[key])
        if key in ROPE and "rope_parameters" not in values:
            raise ConfigError(f"model.config.{key}", "is unknown to this model, which has no rotary positions", got=value)
        if key not in known and key not in ROPE:
            near = difflib.get_close_matches(key, sorted(values), n=1)
            fix = f"Did you mean model.config.{near[0]}?" if near else f"{kind.__name__} has no such entry."
            raise ConfigError(f"model.config.{key}", "is unknown to this model", got=value, fix=fix)


def _check_heads(config: PretrainedConfig) -> None:
    """Raises ConfigError for numbers of heads that transformers accepts but then computes wrongly or not at all."""
    check_trainable(config)  # first, since other models may have several text configs
    text: Any = config.get_text_config()
    heads, pairs = getattr(text, "num_attention_heads", None), largest(text, "num_key_value_heads")
    if isinstance(heads, int) and isinstance(pairs, int) and (pairs < 1 or heads % pairs):
        rule = f"must divide num_attention_heads, which is {heads}"
        raise ConfigError("model.config.num_key_value_heads", rule, got=pairs)
    head_dim = largest(text, "head_dim")
    if isinstance(head_dim, int) and head_dim % 2 and getattr(text, "rope_parameters", None):
        raise ConfigError("model.config.head_dim", "must be even, since rotary positions turn pairs of numbers", got=head_dim)


@contextmanager
def _accepted(changes: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # config classes have rules of their own, with many kinds of errors
        raise ConfigError(
            "model.config", f"must be a config that transformers accepts ({last_line(error)})", got=dict(changes)
        ) from error


def _changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """The config as transformers would read it from a config.json with these entries. Old names of rotary settings (ROPE) are
    translated."""
    _check_known(config, changes)
    values, changes = config.to_dict(), dict(changes)
    rope = {name: changes.pop(name) for name in ROPE if name in changes}
    if rope:
        parameters = dict(values["rope_parameters"] or {})
        if scaling := rope.get("rope_scaling"):
            parameters |= scaling
            parameters["rope_type"] = scaling.get("rope_type", scaling.get("type", parameters.get("rope_type", "default")))
            parameters.pop("type", None)
        if "rope_theta" in rope:
            parameters["rope_theta"] = rope["rope_theta"]
        changes["rope_parameters"] = parameters
    with _accepted(changes):
        changed = type(config).from_dict({**values, **changes})
    _check_heads(changed)
    changed.name_or_path = config.name_or_path
    return changed


def _said(error: Exception) -> str:
    """The first line of the error's message, or the last line if the first only announces it."""
    first = first_line(error)
    return last_line(error) if first.endswith(":") else first


def load_model(
    config: PretrainedConfig,
    path: str | None,
    *,
    weights: str,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    scores: bool = False,
    files: Files | None = None,
    text_only: bool = True,
) -> PreTrainedModel:
    """A model with weights in `dtype` on `device`, or without weights on the meta device.

    weights: "pretrained" or "random". Random weights depend on the config, the seed and the type of device (cpu, cuda). files:
    the weights stay in these files until each worker reads its shard. scores: the model has a score head (one number for a text)
    in place of a language model head; it is random if the folder has none. text_only: drop the other towers of a multimodal
    model. Raises ConfigError if there is no such model at `path`, or if its weights don't fit the config.
    """
    transformers.logging.disable_progress_bar()
    check_trainable(config)
    auto: Any = AutoModelForSequenceClassification if scores else auto_class(config)
    if scores:
        config = _with_score_head(config)
    device = torch.device(device)
    if files is not None:
        assert path is not None
        folder = packaged.resolve(path)
        model = model_in_files(auto, config, folder, files, dtype=dtype, trust_remote_code=trust_remote_code)
    elif device.type == "meta":
        with device:
            model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    elif weights == "random":
        model = _with_random_weights(auto, config, dtype=dtype, seed=seed, device=device, trust_remote_code=trust_remote_code)
    else:
        assert path is not None
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = _with_stored_weights(auto, config, path, dtype=dtype, seed=seed, device=device, scores=scores, **options)
    return leave_other_media_out(model) if text_only else model


def _with_random_weights(
    auto: Any, config: PretrainedConfig, *, dtype: torch.dtype, seed: int, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []), device if on_cuda else nullcontext():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype if on_cuda else torch.float32, trust_remote_code=trust_remote_code)
    return model if on_cuda else model.to(device=device, dtype=dtype)


def _with_stored_weights(
    auto: Any,
    config: PretrainedConfig,
    path: str,
    *,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    scores: bool,
    **options: Any,
) -> PreTrainedModel:
    """The model with its stored weights. Raises ConfigError if weights are missing (except a score head, which is then random) or
    have other shapes. options: more arguments of from_pretrained.
    """
    try:
        with torch.random.fork_rng(devices=[]), _report_kept_back():
            torch.manual_seed(seed)
            model, found = auto.from_pretrained(
                packaged.resolve(path),
                config=config,
                dtype=dtype,
                device_map={"": device},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
    except UNREADABLE as error:
        raise _unreachable(path, error) from None
    if found["mismatched_keys"]:
        raise other_shape(path, *min(found["mismatched_keys"]))
    if getattr(config, "quantization_config", None) is not None:
        _all_of_type(model, dtype)
    backbone = f"{model.base_model_prefix}."
    missing = sorted(name for name in found["missing_keys"] if not scores or name.startswith(backbone))
    if missing:
        raise ConfigError(
            "model.path",
            f"must have all weights of a {type(model).__name__}: {len(missing)} are missing, such as {missing[0]}",
            got=path,
            fix="A part of the model was not copied, or its config.json names another architecture.",
        )
    return model


def _all_of_type(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert all weights to `dtype`. In models with quantized files, transformers leaves some other weights in their file's
    type."""
    kept = set(model._keep_in_fp32_modules_strict or ())
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != dtype and not kept & {*name.split(".")}:
            weight.data = weight.data.to(dtype)


def files_to_read(
    config: PretrainedConfig, path: str, *, revision: str | None = None, trust_remote_code: bool = False, scores: bool = False
) -> Files | None:
    """The files of the weights, if a worker can read its part of each tensor from them; else None."""
    if getattr(config, "quantization_config", None) is not None:
        return None  # the weights are dequantized when they are loaded
    model = load_model(
        config,
        path,
        weights="pretrained",
        dtype=torch.float32,
        seed=0,
        device="meta",
        trust_remote_code=trust_remote_code,
        scores=scores,
    )
    return files_of(model, packaged.resolve(path), revision=revision)


@contextmanager
def _report_kept_back() -> Iterator[None]:
    """Suppress transformers' table of missing weights, which would list a new score head. Other missing weights raise an
    error."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _with_score_head(config: PretrainedConfig) -> PretrainedConfig:
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        known = "llama, mistral, qwen2, qwen3, gemma3_text, phi3 among others"
        raise ConfigError(
            "model", f"must be of a family that transformers has for sequence classification: {known}", got=config.model_type
        )
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of the language model, including parts for other media; for a model with its own code, the class in that code."""
    if (own := own_class(config, auto_class(config).__name__)) is not None:
        return own
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING  # typed as if a family could have two language models
    with_images: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return (with_images.get(type(config), None) if is_multimodal(config) else None) or known.get(type(config), None)


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' auto class that loads a config's language model, including parts for other media. Some families also have a
    text-only class, whose weights have other names."""
    with_images = is_multimodal(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def check_trainable(config: PretrainedConfig) -> None:
    """Raises ConfigError for a model that neither is a causal language model nor a supported multimodal model with one inside."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or (is_multimodal(config) and config.model_type in TRAINED_ON_TEXT):
        return
    if is_multimodal(config):
        rule = f"must be a language model, or one of several media that is trained on text, which {config.model_type} is not"
        fix = f"Of several media there are {', '.join(TRAINED_ON_TEXT)}."
    elif config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        rule = f"must be a language model that predicts each token from those before it, which {config.model_type} is not"
        fix = "Choose one of another family: llama, mistral, qwen3, gemma3_text, phi3, granite, olmo2 are some that do."
    else:
        return
    raise ConfigError("model.path", rule, got=config.name_or_path or config.model_type, fix=fix)


def positions(config: PretrainedConfig) -> int | None:
    """The maximum number of positions that is supported for the model; None if the config has no limit."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None), first_chunk(config)
    return min(filter(None, known), default=None)


def _unreachable(path: str, error: Exception) -> ConfigError:
    if Path(path).is_dir():
        return ConfigError("model.path", f"must be a folder with a model ({_said(error)})", got=path)
    return ConfigError(
        "model.path",
        "must be a folder or the id of a model on a hub that this machine reaches",
        got=path,
        fix=f"({first_line(error)})",
    )
