from __future__ import annotations

from typing import Any, Literal

from raytune_llm.config.section import section


@section
class ModelConfig:
    path: str | None
    """A local folder or a hub id; none builds the model from `config` alone."""
    revision: str | None
    weights: Literal["pretrained", "random"]
    """random: the same architecture with fresh weights drawn from train.seed, for trials without a download."""
    config: dict[str, Any]
    """Entries of the transformers config: all of it (with model_type) where path is none, changes to it elsewhere."""
    tokenizer: str | None
    """A folder or hub id; none is the model's own; `bytes` is the built-in tokenizer of 256 bytes and ChatML's marks."""
    trust_remote_code: bool
    attention: Literal["auto", "varlen", "flash2", "flash3", "flash4", "flex", "sdpa"]
    """varlen is torch's own FlashAttention; flash2 to flash4 are packages. auto takes flash3 where it is installed and the GPU
    with Hopper's architecture (sm_90), else the first of varlen, sdpa and flex that can run."""
