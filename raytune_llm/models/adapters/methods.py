"""Adapter methods: name -> method."""

from __future__ import annotations

from raytune_llm.models.adapters.dora import DORA
from raytune_llm.models.adapters.eva import EVA
from raytune_llm.models.adapters.ia3 import IA3
from raytune_llm.models.adapters.loftq import LOFTQ
from raytune_llm.models.adapters.lora import LORA
from raytune_llm.models.adapters.lora_plus import LORA_PLUS
from raytune_llm.models.adapters.method import Method
from raytune_llm.models.adapters.oft import OFT
from raytune_llm.models.adapters.pissa import PISSA
from raytune_llm.models.adapters.rslora import RSLORA
from raytune_llm.models.adapters.vera import VERA

METHODS: dict[str, Method] = {
    "lora": LORA,
    "rslora": RSLORA,
    "lora_plus": LORA_PLUS,
    "dora": DORA,
    "pissa": PISSA,
    "loftq": LOFTQ,
    "eva": EVA,
    "oft": OFT,
    "vera": VERA,
    "ia3": IA3,
}
