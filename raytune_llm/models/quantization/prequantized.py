"""Models whose files contain quantized weights, according to their config. They are dequantized to the run's precision on
loading.

Such models train like others, also with `quantization=`. Formats that also quantize activations (W8A8) lose that: activations
stay in the run's precision.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.quantization.formats import FORMATS, method_of
from raytune_llm.models.quantization.formats.reader import StoredIn

UNPACKED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""Methods that transformers dequantizes: the FP8 blocks of DeepSeek and Qwen, gpt-oss's MXFP4, and llm-compressor's formats
(W8A8, W4A16, FP8)."""
NEEDS_PACKAGE = {"compressed-tensors": ("compressed_tensors", "raytune-llm[quantized]")} | {
    method: kind.package for method, kind in FORMATS.items() if kind.package is not None
}
"""Method -> the package that reads its files, and the extra of this project that installs it."""
INSTEAD = "Name the model that it was made of, with quantization=bnb_nf4 (4 bits) or bnb_int8 (8 bits)."


def unpacked(config: PretrainedConfig, path: str) -> PretrainedConfig:
    """The config, changed so that weights are dequantized on loading. Raises ConfigError for a method that can't be read."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return config
    given = given if isinstance(given, dict) else given.to_dict()
    method = method_of(given)
    if method not in (*UNPACKED, *FORMATS):
        known = ", ".join((*UNPACKED, *FORMATS))
        rule = f"must have weights that are not quantized, or by {known}; these are by {method}, which can't be trained on"
        raise ConfigError("model.path", rule, got=path, fix=INSTEAD)
    package, extra = NEEDS_PACKAGE.get(method, (None, None))
    if package is not None and find_spec(package) is None:
        rule = f"holds weights by {method}, which needs {package} to be read"
        raise ConfigError("model.path", rule, got=path, fix=f"Install it: pip install '{extra}'.")
    if method in UNPACKED:
        config.quantization_config = {**given, "dequantize": True}
    elif (lacking := FORMATS[method].lacks(given, config.model_type)) is not None:
        raise ConfigError("model.path", f"holds weights by {method} that can't be read here: {lacking}", got=path, fix=INSTEAD)
    else:
        config.quantization_config = StoredIn(given).to_dict()
    return config


def described(config: PretrainedConfig) -> str | None:
    """A description of the files' quantization; None if the weights are not quantized."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    return f"by {method_of(given.get('stored', given))}, unpacked as they are loaded"
