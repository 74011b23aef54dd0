"""How files hold weights that were quantized before: name of the method -> the format. The weights are read as what they stand
for.

transformers reads these by their packages, and keeps them packed in layers of those; here they become ordinary weights as they
are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_llm.models.quantization.formats.aqlm import AQLM
from raytune_llm.models.quantization.formats.awq import AWQ
from raytune_llm.models.quantization.formats.bnb import BitsAndBytes
from raytune_llm.models.quantization.formats.format import Format
from raytune_llm.models.quantization.formats.gptq import GPTQ
from raytune_llm.models.quantization.formats.hqq import HQQFiles

__all__ = ["FORMATS", "Format", "method_of"]

FORMATS: dict[str, type[Format]] = {"gptq": GPTQ, "awq": AWQ, "aqlm": AQLM, "bitsandbytes": BitsAndBytes, "hqq": HQQFiles}


def method_of(given: Mapping[str, Any]) -> str:
    """given: a config's quantization_config."""
    in_bits = given.get("load_in_4bit") or given.get("load_in_8bit")
    return given.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
