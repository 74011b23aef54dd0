from __future__ import annotations

import re
import warnings
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.grouped import group
from raytune_llm.models.layers import named_layers


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    last_layers: int | None,
    path: str | None,
    scores: bool = False,
) -> nn.Module:
    """LoRA (Hu et al. 2021) on the target layers of a frozen model, new or going on from a saved adapter."""
    task_type = "SEQ_CLS" if scores else "CAUSAL_LM"
    if path is not None:
        if not (Path(path) / "adapter_config.json").is_file():
            raise ConfigError(
                "adapter.path",
                "must be a folder with adapter_config.json",
                got=path,
                fix="Train that adapter first, or name another.",
            )
        saved = PeftConfig.from_pretrained(path)
        saved.task_type = task_type
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # a score head that the adapter did not have
            adapted = PeftModel.from_pretrained(model, path, config=saved, is_trainable=True, autocast_adapter_dtype=True)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules=targets,
            exclude_modules=None if last_layers is None else _in_layers_before(model, last_layers),
            task_type=task_type,  # type: ignore[arg-type]
        )
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise ConfigError(
                "adapter.targets", "must name linear layers of the model", got=targets, fix=f"It has {', '.join(names)}."
            ) from error
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast casts what it needs to; a copy in float32 would be for nothing
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # PEFT does it to the adapter, but not to a score head
    return group(adapted)


def rank(model: nn.Module) -> int:
    """The largest of its adapters; 0 without any."""
    adapted = (module for module in model.modules() if isinstance(module, LoraLayer))
    return max((rank for layer in adapted for rank in layer.r.values()), default=0)


def _in_layers_before(model: PreTrainedModel, last: int) -> str | None:
    """A pattern of the names of all modules in the layers before the last so many. None where there are no others."""
    names = [name for name, _ in named_layers(model)]
    before = "|".join(map(re.escape, names[:-last]))
    return rf"({before})\..*" if before else None
