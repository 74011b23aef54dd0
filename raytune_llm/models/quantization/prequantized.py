"""Models whose files hold quantized weights, by their config.

Some are dequantized to the run's precision: they train like any model, and `quantization=` is for them
too. Of the others the layers are their packages' own, which no adapter here is on.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError

UNPACKED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""DeepSeek's and Qwen's blocks of FP8, gpt-oss's MXFP4, and llm-compressor's formats (W8A8, W4A16, FP8): transformers unpacks
them as it loads them. Activations, which W8A8 quantizes as well, stay as they are."""
NEEDS_PACKAGE = {"compressed-tensors": ("compressed_tensors", "raytune-llm[quantized]")}
"""What reads a method's files, and the extra of this project that installs it."""


def unpacked(config: PretrainedConfig, path: str) -> PretrainedConfig:
    """The config, so that weights are read unpacked. Raises ConfigError for a quantization that can't be."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return config
    given = given if isinstance(given, dict) else given.to_dict()
    in_bits = given.get("load_in_4bit") or given.get("load_in_8bit")
    method = given.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    if method not in UNPACKED:
        known = ", ".join(UNPACKED)
        rule = f"must hold weights that are not quantized, or by {known}; these are by {method}, which can't be trained on"
        fix = "Name the model that it was made of, with quantization=bnb_nf4 (4 bits) or bnb_int8 (8 bits)."
        raise ConfigError("model.path", rule, got=path, fix=fix)
    package, extra = NEEDS_PACKAGE.get(method, (None, None))
    if package is not None and find_spec(package) is None:
        rule = f"holds weights by {method}, which needs {package} to be read"
        raise ConfigError("model.path", rule, got=path, fix=f"Install it: pip install '{extra}'.")
    config.quantization_config = {**given, "dequantize": True}
    return config
