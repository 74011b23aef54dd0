"""Models whose files hold quantized weights, by their config: they are unpacked to the run's precision as they are loaded.

They train like any model, and `quantization=` is for them too. What activations are quantized as well (W8A8) stay as they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import PretrainedConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.quantization.formats import FORMATS, method_of
from raytune_llm.models.quantization.formats.reader import StoredIn

UNPACKED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
"""What transformers unpacks: DeepSeek's and Qwen's blocks of FP8, gpt-oss's MXFP4, and llm-compressor's formats (W8A8, W4A16,
FP8)."""
NEEDS_PACKAGE = {"compressed-tensors": ("compressed_tensors", "raytune-llm[quantized]")} | {
    method: kind.package for method, kind in FORMATS.items() if kind.package is not None
}
"""What reads a method's files, and the extra of this project that installs it."""
INSTEAD = "Name the model that it was made of, with quantization=bnb_nf4 (4 bits) or bnb_int8 (8 bits)."


def unpacked(config: PretrainedConfig, path: str) -> PretrainedConfig:
    """The config, so that weights are read unpacked. Raises ConfigError for a quantization that can't be."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return config
    given = given if isinstance(given, dict) else given.to_dict()
    method = method_of(given)
    if method not in (*UNPACKED, *FORMATS):
        known = ", ".join((*UNPACKED, *FORMATS))
        rule = f"must hold weights that are not quantized, or by {known}; these are by {method}, which can't be trained on"
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
    """What the files of its weights are by; None if they are not quantized."""
    given: Any = getattr(config, "quantization_config", None)
    if given is None:
        return None
    given = given if isinstance(given, dict) else given.to_dict()
    return f"by {method_of(given.get('stored', given))}, unpacked as they are loaded"
