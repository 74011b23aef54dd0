"""One adapter in host memory, in a bank's order of layers: read from a folder, or newly initialized."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, Layered, SavedAdapter
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.banked import BankShape
from raytune_llm.models.adapters.method import new_config, sides
from raytune_llm.models.adapters.methods import method_of
from raytune_llm.models.adapters.saved import PREFIX, WEIGHTS, read_config, tensor_names
from raytune_llm.models.lora_starts import changes_the_base

A, B = ".lora_A.weight", ".lora_B.weight"
"""A tensor's name in a file is PREFIX + the layer's name + A or B."""
MORE = {
    "use_dora": "DoRA",
    "layer_replication": "layers that are repeated",
    "lora_bias": "a bias",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "tokens of its own",
    "target_parameters": "parameters that are no layer's",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
"""Attributes of PEFT's LoraConfig that add something to B A -> what they add, for messages."""
UNMIXED_FIX = "Set engine=hf, or merge it into its base by `export`."


@dataclass(frozen=True, eq=False)
class Weights:
    """An adapter's weights in the form that a bank loads."""

    flat: Tensor
    """A [r, K] and then B.T [r, O] of each layer with the adapter, flattened and concatenated."""
    ranks: Mapping[str, int]
    """The rank of each layer, in the bank's order."""
    scales: Mapping[str, float]
    config: LoraConfig

    @property
    def rank(self) -> int:
        return max(self.ranks.values())


@dataclass(frozen=True)
class Layout:
    """The layers and the rank of a bank, with which adapters are checked."""

    sizes: Mapping[str, tuple[int, int]]
    """The name of each layer in the model -> (inputs, outputs)."""
    shape: BankShape

    @property
    def numel(self) -> int:
        """The numbers of an adapter of the slots' rank on every layer."""
        return self.shape.rank * sum(inputs + outputs for inputs, outputs in self.sizes.values())

    def read(self, folder: str | Path, setting: str) -> Weights:
        """Read an adapter's folder. Raises ConfigError, which names the setting, if it doesn't fit the model or a slot."""
        path, config = str(folder), read_config(str(folder), setting)
        if (more := more_than_lora(config) or _outside_layers(path, setting)) is not None:
            rule = f"must be plain LoRA of the model's layers, to share a batch with others, and is {more}"
            raise ConfigError(setting, rule, got=path, fix=UNMIXED_FIX)
        assert isinstance(config, LoraConfig)
        if not (Path(path) / WEIGHTS[0]).is_file():
            raise ConfigError(setting, f"must be a folder with {WEIGHTS[0]}", got=path, fix="Save it as safetensors.")
        try:
            return self.arranged(config, load_file(Path(path) / WEIGHTS[0]))
        except (SafetensorError, OSError) as error:
            raise ConfigError(setting, f"must hold weights that can be read ({error})", got=path) from error
        except Misfit as misfit:
            base = config.base_model_name_or_path
            fix = f"It was trained on {base}." if base else ""
            raise ConfigError(setting, f"must be an adapter of this model: {misfit}", got=path, fix=fix) from None

    def drawn(self, model: PreTrainedModel, section: AdapterConfig, seed: int, kept_in: torch.dtype) -> Weights:
        """The initial weights of a separate run with this seed. kept_in: the dtype of the model's weights before quantization."""
        assert isinstance(section, Layered) and section.path is None
        config, layers = new_config(model, section, method_of(section))
        more = more_than_lora(config)
        if more is None and getattr(config, "init_lora_weights", True) is not True:
            more = "initialized from singular values"
        if more is not None:
            raise ConfigError("adapter", f"must be plain LoRA to be trained with others, and is {more}", got=section.name)
        assert isinstance(config, LoraConfig)
        drawn: dict[str, Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, layer in layers.items():
                inputs, outputs = sides(layer)
                # PEFT makes both layers as torch does, which draws for each, and then draws A once more.
                rank = int(told_rank(config, name))
                a, b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
                weight = getattr(layer, "weight", None)
                first_in = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else kept_in
                drawn[PREFIX + name + A] = a.weight.detach().to(first_in)
                drawn[PREFIX + name + B] = torch.zeros_like(b.weight)
        try:
            return self.arranged(config, drawn)
        except Misfit as misfit:
            raise ConfigError("adapter", f"must fit the bank: {misfit}", got=section.name) from None

    def arranged(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> Weights:
        """The tensors of an adapter's file in the bank's order. Raises Misfit if they don't fit."""
        unknown = sorted(tensors.keys() - {PREFIX + name + own for name in self.sizes for own in (A, B)})
        if unknown:
            raise Misfit(f"{len(unknown)} of its tensors are for layers without a bank (for example {unknown[0]})")
        parts: list[Tensor] = []
        ranks: dict[str, int] = {}
        scales: dict[str, float] = {}
        for name, (inputs, outputs) in self.sizes.items():
            a_RK, b_OR = tensors.get(PREFIX + name + A), tensors.get(PREFIX + name + B)
            if a_RK is None and b_OR is None:
                continue
            if a_RK is None or b_OR is None:
                raise Misfit(f"it has only one of A and B for {name}")
            rank = len(a_RK) if a_RK.ndim else 0
            if not rank:
                raise Misfit(f"{name} has an A of shape {list(a_RK.shape)}, which has no rank")
            if a_RK.shape != (rank, inputs) or b_OR.shape != (outputs, rank):
                raise Misfit(f"{name} has A {list(a_RK.shape)} and B {list(b_OR.shape)} there, and is {inputs} -> {outputs} here")
            if rank > self.shape.rank:
                raise Misfit(f"{name} has rank {rank}, and slots have rank {self.shape.rank}")
            if (told := told_rank(config, name)) != rank:
                raise Misfit(f"{name} has rank {rank} by its tensors, but {told} by its config")
            ranks[name], scales[name] = rank, scale_of(config, name, rank)
            b_RO = b_OR.T if self.shape.trains else b_OR.T.float() * scales[name]
            parts += [a_RK.to(self.shape.dtype).flatten(), b_RO.to(self.shape.dtype).flatten()]
        if not ranks:
            raise Misfit("it holds no tensor")
        flat = torch.cat(parts)
        if not flat.sum(dtype=torch.float32).isfinite():  # one pass over all; only where it fails, each by itself
            for name, a, b in zip(ranks, parts[::2], parts[1::2], strict=True):
                if not (a.isfinite().all() and b.isfinite().all()):
                    raise Misfit(f"{name} has weights that are not finite, which would reach other adapters")
        return Weights(flat=flat, ranks=ranks, scales=scales, config=config)


class Misfit(Exception):
    """The reason why an adapter doesn't fit a bank."""


def write(folder: Path, config: LoraConfig, tensors: Mapping[str, tuple[Tensor, Tensor]], *, base_model: str | None) -> None:
    """Write an adapter's folder as PEFT does. tensors: layer -> (A [r, K], B [O, r])."""
    named = {PREFIX + name + own: value for name, pair in tensors.items() for own, value in zip((A, B), pair, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in named.items()}, folder / WEIGHTS[0], metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode, config.base_model_name_or_path = True, base_model
    config.save_pretrained(str(folder))


def more_than_lora(config: PeftConfig) -> str | None:
    """What an adapter has besides B A of linear layers, for messages; it then can't share a pass with others. None if nothing."""
    if not isinstance(config, LoraConfig):
        return str(getattr(config.peft_type, "value", config.peft_type))
    if config.bias != "none":
        return "with biases"
    if changes_the_base(start := config.init_lora_weights):
        return f"initialized by {start}, which changes the base"
    found = next((what for name, what in MORE.items() if getattr(config, name, None)), None)
    return None if found is None else f"with {found}"


def unmixed(folder: str, setting: str) -> str | None:
    """`more_than_lora` for an adapter's folder. Raises ConfigError, which names the setting, if the folder is not an
    adapter's."""
    return more_than_lora(read_config(folder, setting)) or _outside_layers(folder, setting)


def reads_weights(adapter: SavedAdapter) -> bool:
    """Whether its layers need the values of the base's weights, not only their outputs: DoRA, for its row norms."""
    return bool(getattr(read_config(adapter.path, adapter.setting), "use_dora", False))


def _outside_layers(folder: str, setting: str) -> str | None:
    """A description of the first tensor outside of the numbered layers (of an embedding or the head); None if there is none."""
    names = (name.removeprefix(PREFIX) for name in tensor_names(folder, setting))
    found = next((name for name in names if not any(part.isdigit() for part in name.split("."))), None)
    return None if found is None else f"on {found.partition('.lora_')[0]}, outside of the layers"


def told_rank(config: LoraConfig, name: str) -> float:
    """The rank of a layer by the config. Raises Misfit if it is not a number."""
    return _by_pattern(config.rank_pattern, name, config.r)


def _by_pattern(patterns: Any, name: str, default: float) -> float:
    try:
        found = (patterns or {}).get(get_pattern_key(list(patterns or {}), name), default)
    except (re.error, TypeError, AttributeError) as error:
        raise Misfit(f"rank_pattern and alpha_pattern must be objects of patterns ({error})") from None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Misfit(f"its config has no number for {name}, but {found!r}")
    return found


def scale_of(config: LoraConfig, name: str, rank: int) -> float:
    """The factor of B A for a layer by the config. Raises Misfit if the config's alpha is not a number."""
    alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
