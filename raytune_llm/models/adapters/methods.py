"""The list of adapter methods, and how the options of a section change one."""

from __future__ import annotations

from peft import PeftConfig

from raytune_llm.config.adapter import Layered
from raytune_llm.models.adapters.dora import with_lengths
from raytune_llm.models.adapters.eva import EVA
from raytune_llm.models.adapters.ia3 import IA3
from raytune_llm.models.adapters.loftq import LOFTQ
from raytune_llm.models.adapters.lora import LORA
from raytune_llm.models.adapters.method import Method
from raytune_llm.models.adapters.oft import OFT
from raytune_llm.models.adapters.pissa import PISSA
from raytune_llm.models.adapters.vera import VERA

METHODS: dict[str, Method] = {
    "lora": LORA,
    "pissa": PISSA,
    "loftq": LOFTQ,
    "eva": EVA,
    "oft": OFT,
    "vera": VERA,
    "ia3": IA3,
}


def method_of(section: Layered) -> Method:
    """The method of an adapter's section."""
    return _computed(METHODS[section.name], lengths=getattr(section, "dora", False))


def saved_method(config: PeftConfig) -> tuple[str, Method] | None:
    """The name and the method of a saved adapter; None for one of PEFT's methods that is not supported."""
    found = next(((name, method) for name, method in METHODS.items() if method.describes(config)), None)
    if found is None:
        return None
    lengths = getattr(config, "use_dora", False)
    return "dora" if lengths else found[0], _computed(found[1], lengths=lengths)


def _computed(method: Method, *, lengths: bool) -> Method:
    return with_lengths(method) if lengths else method
