"""Policies: weights, adapters, quantization and attention."""

import logging

# On CPUs with bf16 it warns, wherever PEFT imports it, of a kernel for inference that it would fetch from a hub: nothing of ours.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
