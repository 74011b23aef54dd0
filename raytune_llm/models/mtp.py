"""Multi-token prediction: extra layers that predict the token after the next (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2).

Files of DeepSeek V3, GLM 4.5, Qwen3-Next and others have them, for speculative decoding. transformers does not load them, and
they are not trained here. A whole model is saved with the base's layers, so that engines find them. The more the model was
trained, the fewer of their predictions are accepted.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from raytune_llm import packaged
from raytune_llm.models.stored import Files, tensor_files

NAMED = re.compile(r"(^|\.)mtp[._]")
"""Names of these tensors in most families (mtp.layers.0.mlp.up_proj.weight)."""
NUMBERED = re.compile(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.")
"""In other families, they are layers with numbers after the last one (DeepSeek V3, GLM 4.5)."""


@dataclass(frozen=True)
class PredictionLayers:
    files: Files
    """Tensor name -> its file."""
    left_out: str | None = None
    """The reason why a saved model lacks these layers; None if it has them."""

    def read(self) -> Mapping[str, Tensor]:
        """The tensors, in the types of the files."""
        by_file: dict[str, list[str]] = defaultdict(list)
        for name, file in ({} if self.left_out is not None else self.files).items():
            by_file[file].append(name)
        tensors: dict[str, Tensor] = {}
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in names}
        return tensors

    def described(self) -> str | None:
        """A sentence for the log about these layers; None for a model without them."""
        if not self.files:
            return None
        what = f"multi-token prediction: {len(self.files)} tensors of the base's files"
        if self.left_out is not None:
            return f"{what} are not in final/ ({self.left_out})"
        return f"{what} go into final/ as they are; they are not trained"


def prediction_layers(config: PretrainedConfig, path: str, revision: str | None, *, grows: bool) -> PredictionLayers:
    """The prediction layers of the base at `path`. config: the config of the trained model. grows: it gets tokens or layers that
    the base does not have."""
    folder = packaged.resolve(path)
    values, _ = PretrainedConfig.get_config_dict(folder, revision=revision)
    text: dict[str, Any] = values.get("text_config") or values
    layers = text.get("num_hidden_layers", 0)
    more = text.get("num_nextn_predict_layers") or text.get("num_mtp_layers") or 0

    def is_one(name: str) -> bool:
        numbered = NUMBERED.match(name)
        return bool(NAMED.search(name)) or (numbered is not None and layers <= int(numbered[1]) < layers + more)

    files = {name: file for name, file in tensor_files(folder, revision).items() if is_one(name)}
    if getattr(config, "quantization_config", None) is not None:
        return PredictionLayers(files, "the base's are quantized")
    if grows or config.get_text_config().num_hidden_layers != layers:
        return PredictionLayers(files, "the model has other layers or tokens than the base")
    return PredictionLayers(files)
