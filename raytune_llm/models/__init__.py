"""Policies: weights, adapters, quantization and attention."""

import logging

from transformers.utils import is_hqq_available, is_scipy_available

from raytune_llm.models.hidden import hidden

# On CPUs with bf16 it warns of a kernel for inference that it would fetch from a hub: nothing of ours.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# transformers would load them for a kind of key-value cache and for losses of object detection, which nothing here uses; it
# remembers the answers.
is_scipy_available.cache_clear()  # it has asked for itself already
with hidden("hqq", "scipy"):
    is_hqq_available()
    is_scipy_available()
