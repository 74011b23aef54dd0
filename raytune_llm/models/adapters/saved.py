"""Reading an adapter's folder as PEFT writes it: its config, its tensors, and the check that they fit a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.adapter_folder import CONFIG, WEIGHTS, check_files
from raytune_llm.errors import ConfigError, first_line
from raytune_llm.finished import check_unchanged
from raytune_llm.models.adapters.peft_alone import find_bitsandbytes

PREFIX = "base_model.model."
"""The prefix of parameter names in PEFT's model and in its files."""
NUMBERS = ("r", "alpha", "lora_alpha")
"""Numeric entries of a config, which PEFT does not check."""
MAX_HASHED_BYTES = 256 << 20
"""Adapter files up to this size are hashed. A server reads them several times, so the limit is lower than for models."""


def read_config(path: str, setting: str) -> PeftConfig:
    """The config of the adapter in the folder. Raises ConfigError, which names the setting, if the folder is not an adapter's."""
    check_files(path, setting)
    check_unchanged(Path(path), setting, max_bytes=MAX_HASHED_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")
            config = PeftConfig.from_pretrained(path)
        if config.peft_type is None or config.is_prompt_learning:
            raise ValueError("peft_type is not a method that changes a model's layers")
        for name in NUMBERS:
            value = getattr(config, name, None)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} is no number: {value!r}")
        if getattr(config, "init_lora_weights", None) == "loftq":  # PEFT quantizes the base again
            find_bitsandbytes()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(setting, f"must hold an {CONFIG} that PEFT reads ({first_line(error)})", got=path) from error
    tensor_names(path, setting)
    return config


@contextmanager
def _weights_are_read(path: str, setting: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        rule = f"must hold weights that can be read ({first_line(error)})"
        raise ConfigError(setting, rule, got=path, fix="Copy the whole folder again.") from error


def task_of(path: str, setting: str) -> str | None:
    """PEFT's task type of the adapter: CAUSAL_LM, SEQ_CLS, ..."""
    return read_config(path, setting).task_type


def tensor_names(path: str, setting: str) -> list[str]:
    """The tensor names in its safetensors file; an empty list if it has another format. Raises ConfigError for a damaged file."""
    weights = Path(path) / WEIGHTS[0]
    if not weights.is_file():
        return []
    with _weights_are_read(path, setting), safe_open(weights, framework="pt") as opened:  # its header, not its tensors
        return list(opened.keys())


def other_base(path: str, setting: str, here: str) -> str | None:
    """A warning if the adapter's config names another base than `here` (the base_name of a model's section); else None. Paths
    with the same last part count as the same model."""
    there = read_config(path, setting).base_model_name_or_path
    if not there or not here or _known_as(there) == _known_as(here):
        return None
    return f"{setting}: {path} was trained on {there}, not on {here}; only their shapes can be checked"


def _known_as(base: str) -> tuple[str, list[tuple[str, ...]]]:
    """The last part of a path or hub id (also of a path in a hub's cache), and the last two parts of each adapter merged into
    it."""
    path, _, merged = base.partition(" with ")
    in_cache = [part for part in Path(path).parts if part.startswith("models--")]
    name = in_cache[0].rpartition("--")[2] if in_cache else Path(path).name
    return name.lower(), [Path(folder).parts[-2:] for folder in merged.removesuffix(" merged").split(", ")]


def rank_of(path: str, setting: str) -> int:
    """The adapter's rank; 0 if its method has none."""
    return int(getattr(read_config(path, setting), "r", 0))


def base_of(path: str, setting: str) -> str:
    """The path or hub id of the model it was trained on. Raises ConfigError if its config doesn't have it."""
    base = read_config(path, setting).base_model_name_or_path
    if not base:
        raise ConfigError(setting, f"must say in its {CONFIG} what its base is", got=path, fix="Set model.path to the base.")
    return base


def token_ids_of(path: str, setting: str) -> list[int]:
    """The tokens whose embeddings belong to the adapter."""
    given = getattr(read_config(path, setting), "trainable_token_indices", None) or []
    return sorted({id for ids in given.values() for id in ids} if isinstance(given, dict) else given)


def in_peft_alone(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The adapter loaded on a transformers model by PEFT only, without this project's layers; for checks of exports."""
    return PeftModel.from_pretrained(base, str(folder))


def load_weights(
    model: PeftModel, key: str, path: str, setting: str, *, may_lack: tuple[str, ...] = (), base_model: str | None = None
) -> None:
    """Load PEFT's adapter `key` from a folder.

    Raises ConfigError, which names the setting, if tensors are missing, unexpected or of another shape. Tensors whose names end
    in one of may_lack may be missing and then keep their values. base_model: the base in the adapter's config, for the message.
    """
    here = get_peft_model_state_dict(model, adapter_name=key, save_embedding_layers=False)
    found = {name: value for name, value in here.items() if name.endswith(may_lack)} | _read(model, path, setting)
    others = sorted(name for name in found.keys() & here.keys() if found[name].shape != here[name].shape)
    if others:
        name = others[0]
        raise unfit(f"{name} is {list(found[name].shape)} there and {list(here[name].shape)} here", path, setting, base_model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not load vera_A")
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        loaded = set_peft_model_state_dict(model, found, adapter_name=key)
    own = names_of(model, key)
    missing, unexpected = sorted(own.keys() & loaded.missing_keys), sorted(loaded.unexpected_keys)
    if missing or unexpected:
        lacks = f"{len(missing)} tensors are missing (for example {missing[0]})" if missing else ""
        other = f"{len(unexpected)} tensors are not of this model (for example {unexpected[0]})" if unexpected else ""
        raise unfit("; ".join(filter(None, (lacks, other))), path, setting, base_model)


def names_of(model: PeftModel, key: str) -> dict[str, nn.Parameter]:
    """The parameters of PEFT's adapter `key`, by their names in the model."""
    # PEFT keeps an adapter's modules in ModuleDicts with the adapter's name as the key.
    return {name: parameter for name, parameter in model.named_parameters() if f".{key}." in f"{name}."}


def _read(model: PeftModel, path: str, setting: str) -> dict[str, Tensor]:
    renamed: Any = getattr(model.base_model.model, "_checkpoint_conversion_mapping", None)
    with _weights_are_read(path, setting):
        return load_peft_weights(path, device="cpu", key_mapping=renamed)


def unfit(what: str, path: str, setting: str, base_model: str | None) -> ConfigError:
    return ConfigError(
        setting,
        f"must be an adapter of this model: {what}",
        got=path,
        fix=f"It was trained on {base_model}." if base_model else "Name an adapter of this model.",
    )


def has_new_tokens(path: str, setting: str) -> ConfigError:
    """The error for an adapter with embeddings of new tokens in model.merged_adapters."""
    rule = "must not have embeddings of new tokens, which the model's own embedding lacks"
    return ConfigError(
        setting, rule, got=path, fix="Export that adapter merged (export.adapters), and set model.path to the result."
    )


def changes_one_end(name: str, path: str, setting: str) -> ConfigError:
    """The error for merging an adapter on the embedding or the head if these are tied."""
    rule = f"can't be merged: it changes {name}, but the embedding and the head are tied, and it changes only one of them"
    return ConfigError(setting, rule, got=path, fix="Use it unmerged (serve.adapters, export.format=adapter).")
