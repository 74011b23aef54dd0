from __future__ import annotations

from typing import Any, Literal

from raytune_llm.config.section import section


@section
class ModelConfig:
    path: str | None
    """A local folder or a hub id; null builds the model from `config` alone."""
    revision: str | None
    weights: Literal["pretrained", "random"]
    """random: the same architecture with random weights drawn from train.seed, for trials without a download."""
    config: dict[str, Any]
    """Entries of the transformers config: the whole config (with model_type) if path is null, otherwise changes to it."""
    tokenizer: str | None
    """A folder or hub id; null is the model's own; `bytes` is a built-in byte tokenizer with ChatML's special tokens."""
    new_tokens: list[str] | dict[str, str] | str | None
    """Words that the tokenizer gets as tokens of their own, with embeddings that are trained, also beside an adapter: a list, a
    description for each, or a file with one of these. An embedding begins as the mean of those of the token's pieces, or of its
    description's."""
    resize_vocab: bool
    """Tokens that data.template needs and the tokenizer lacks are added in the same way, as special tokens."""
    trust_remote_code: bool
    merged_adapters: list[str]
    """Folders of adapters that are merged into the weights, in this order, as the model is loaded: it is then the base of
    everything, also of a new adapter and of a reference."""
    attention: Literal["auto", "varlen", "flash2", "flash3", "flash4", "flex", "sdpa"]
    """varlen is torch's own FlashAttention; flash2 to flash4 are packages. auto takes flash3 if it is installed and the GPU
    is a Hopper GPU (sm_90), else the first of varlen, sdpa and flex that can run."""

    @property
    def base_name(self) -> str:
        """What an adapter says of the model that it was trained on. With others merged into that, it is neither a path nor an id:
        other programs would load the model there without them, and not say so."""
        path = self.path or ""
        return f"{path} with {', '.join(self.merged_adapters)} merged" if self.merged_adapters else path

    @property
    def adds_tokens(self) -> bool:
        return bool(self.new_tokens) or self.resize_vocab
