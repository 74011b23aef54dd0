"""Policies: models with their weights, adapters, quantization and attention."""

import logging

from transformers.utils import is_hqq_available, is_scipy_available

from raytune_llm.models.hidden import hidden

# On CPUs with bf16, it warns about an inference kernel that it would download from a hub, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# transformers would import these packages for a kind of KV cache and for losses of object detection, which are not used here. It
# caches whether they are installed.
is_scipy_available.cache_clear()  # it has asked for itself already
with hidden("hqq", "scipy"):
    is_hqq_available()
    is_scipy_available()
