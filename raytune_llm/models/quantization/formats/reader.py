"""Weights in one of FORMATS as they are loaded: a quantizer of transformers, which its registry has under a name of ours.

It says which tensors of the files make up a weight, and computes the weight of them. The model is an ordinary one; experts that
transformers joins are unpacked before they are joined.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from raytune_llm.models.quantization.formats import FORMATS, method_of

METHOD = "raytune_llm"
WEIGHT = "weight"


@register_quantization_config(METHOD)
class StoredIn(QuantizationConfigMixin):
    """stored: the quantization_config of the files."""

    def __init__(self, stored: Mapping[str, Any], quant_method: str = METHOD, dequantize: bool = True) -> None:
        self.stored, self.dequantize = stored, dequantize
        self.quant_method: Any = quant_method


@register_quantizer(METHOD)
class Reader(HfQuantizer):
    def __init__(self, quantization_config: Any, **options: Any) -> None:
        """quantization_config: a StoredIn."""
        super().__init__(quantization_config, **options)
        stored = quantization_config.stored
        self.format = FORMATS[method_of(stored)].of(stored)
        self.serialized_names = {WEIGHT: list(dict.fromkeys((WEIGHT, *self.format.PARTS)))}

    def get_load_operations(self) -> dict[str, Any]:
        return {"dequantize": Unpack}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversion of quantized weights. Others have names of their own in the files, and are not converted."""
        return [WeightConverter(list(self.format.PARTS), WEIGHT, [Unpack(self)])]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        model._weight_conversions = None  # type: ignore[assignment]  # it is saved as any model of its kind is
        return model

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True


class Unpack(ConversionOps):
    """The parts of weights -> the weights, in the type that the model has them in."""

    def __init__(self, hf_quantizer: Reader) -> None:
        self.hf_quantizer: Any = hf_quantizer  # by this name transformers knows that parts are to be read in their own types

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **_: Any
    ) -> dict[str, Any]:
        """input_dict: for each pattern of names, the tensors that have such a name, one for each expert."""
        dtype = model.get_parameter(full_layer_name).dtype
        layer = model.get_submodule(full_layer_name.rpartition(".")[0])
        by_layer: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)
        names = sorted(self.hf_quantizer.serialized_names[WEIGHT], key=len, reverse=True)
        for pattern in list(input_dict):
            name = next(name for name in names if pattern == name or pattern.endswith(f".{name}"))
            tensors = input_dict.pop(pattern)
            by_layer[pattern.removesuffix(name)][name] = tensors if isinstance(tensors, list) else [tensors]
        made = {}
        for stem, parts in by_layer.items():
            weights = [self._weight(dict(zip(parts, each, strict=True)), dtype) for each in zip(*parts.values(), strict=True)]
            made[stem + WEIGHT] = weights
        if WEIGHT not in made:
            return made
        (weight,) = made[WEIGHT]
        return {full_layer_name: weight.T.contiguous() if isinstance(layer, Conv1D) else weight}

    def _weight(self, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        if parts.keys() == {WEIGHT}:
            return parts[WEIGHT].to(dtype)
        return self.hf_quantizer.format.weight(parts).to(dtype).contiguous()
