"""Policies: weights, adapters, quantization and attention."""

import logging

from transformers.utils import is_hqq_available

from raytune_llm.models.hidden import hidden

# On CPUs with bf16 it warns of a kernel for inference that it would fetch from a hub: nothing of ours.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# transformers would load it for a kind of key-value cache that nothing here uses; it remembers the answer.
with hidden("hqq"):
    is_hqq_available()
