"""Kinds of adapters: name -> what PEFT and this folder need to know of it."""

from __future__ import annotations

from raytune_llm.models.adapters.lora import LORA
from raytune_llm.models.adapters.method import Method

METHODS: dict[str, Method] = {"lora": LORA}
