"""Adapter methods: name -> method."""

from __future__ import annotations

from raytune_llm.models.adapters.dora import DORA
from raytune_llm.models.adapters.lora import LORA
from raytune_llm.models.adapters.method import Method
from raytune_llm.models.adapters.oft import OFT
from raytune_llm.models.adapters.rslora import RSLORA

METHODS: dict[str, Method] = {"lora": LORA, "rslora": RSLORA, "dora": DORA, "oft": OFT}
