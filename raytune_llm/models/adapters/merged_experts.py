"""Merging an adapter on a mixture's experts into the tensors of the base's files.

In the model, the experts of a layer are one tensor, and PEFT's adapter is on it. Most files have one tensor per expert, which
transformers joins on loading. The adapter's change is therefore split in the same way as transformers splits experts to save
them. Only one layer's change is in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

BASE_LAYER = ".base_layer"
WEIGHTS_OF_A_LAYER = 2
"""The number of expert weights (gate_up and down) whose changes are cached, since files mix their tensors."""


def layer_of(wrapper: str) -> str:
    """The name of the experts' module. PEFT nests the adapters of a module's several parameters, one around another."""
    return wrapper.replace(BASE_LAYER, "")


class MergedExperts:
    def __init__(
        self, model: PreTrainedModel, config: Any, own: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]
    ) -> None:
        """model: the base, on the meta device. config: PEFT's config of the adapter. own: the shapes of the adapter's tensors, by
        name in PEFT's model. stored: the shapes of the tensors in the base's files. Raises LookupError if they don't fit."""
        config = copy.deepcopy(config)
        config.task_type, config.modules_to_save, config.trainable_token_indices = None, None, None
        config.base_model_name_or_path = None
        self._model = model
        with torch.device("meta"):
            adapted: Any = get_peft_model(copy.deepcopy(model), config, "default")
        self._wrappers: dict[str, str] = {}
        """The tensor's name in the model -> PEFT's name of the adapter on it."""
        self._layers: dict[str, Any] = {}
        self._fused: dict[str, str] = {}
        """The tensor's name in the files -> its name in the model."""
        for name, module in adapted.base_model.model.named_modules():
            if isinstance(module, ParamWrapper):
                fused = f"{layer_of(name)}.{module.parameter_name}"
                self._wrappers[fused], self._layers[fused] = name, module
                weight = module.get_param()
                if weight.ndim != 3:
                    raise LookupError(f"{fused} is no tensor of several experts")
                pieces = self._pieces(fused, torch.empty_like(weight, device="meta"), stored)
                for part in ("lora_A", "lora_B"):
                    key, expected = f"{name}.{part}.weight", list(getattr(module, part)["default"].weight.shape)
                    if key not in own:
                        raise LookupError(f"{key} is not in its file")
                    if list(own[key]) != expected:
                        raise LookupError(f"{name}.{part} is {list(own[key])} there and {expected} in the base")
                for piece, part in pieces.items():
                    if piece not in stored:
                        raise LookupError(f"{piece} is not in the base")
                    if tuple(stored[piece]) != tuple(part.shape):
                        raise LookupError(f"{piece} is {list(stored[piece])} in the base and {list(part.shape)} in its model")
                    self._fused[piece] = fused
        self._added: dict[str, dict[str, Tensor]] = {}
        """The changes of the tensors that were requested last."""
        self._stored = stored

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors in the files that the adapter changes."""
        return frozenset(self._fused)

    def merged(self, name: str, value: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The merged tensor of the files, in float32. read: returns a tensor of the adapter by its name in PEFT's model."""
        fused = self._fused[name]
        if fused not in self._added:
            while len(self._added) >= WEIGHTS_OF_A_LAYER:
                self._added.pop(next(iter(self._added)))
            self._added[fused] = self._added_to(fused, read)
        return value.float() + self._added[fused][name]

    def _added_to(self, fused: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        layer, wrapper = self._layers[fused], self._wrappers[fused]
        for part in ("lora_A", "lora_B"):
            value = read(f"{wrapper}.{part}.weight").float()
            getattr(layer, part)["default"].weight = nn.Parameter(value, requires_grad=False)
        left, right, scale = layer.get_delta_factors("default")
        return self._pieces(fused, (left @ right).mul_(scale), self._stored)

    def _pieces(self, fused: str, value_ENK: Tensor, stored: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Name -> tensor as in the files, split from the model's tensor."""
        return {fused: value_ENK} if fused in stored else revert_weight_conversion(self._model, {fused: value_ENK})
