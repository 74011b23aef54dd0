from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section
from raytune_llm.errors import ConfigError


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

    shift_attn_tokens: Annotated[int, Field(ge=2, multiple_of=2)] | None
    """Tokens of a group of S2 attention (LongLoRA, Chen et al. 2023, arXiv 2309.12307), for training on long rows: a token
    attends within its group, and for half of the heads groups begin half a group later. A quarter of data.max_length is usual.
    Evaluations and what is saved attend to all. null: training does, too."""

    liger_kernel: bool
    """Liger's Triton kernels (the extra `liger`) for norms, gated MLPs and rotary positions in training, on GPUs. Layers are
    not compiled then; the compiler fuses the same operations and more."""
    positions: PositiveInt | None
    """Tokens of the longest text that the model is to take. Where it has fewer positions, they are scaled by rope_scaling, by the
    smallest whole factor that suffices; null: as many as it has."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None
    """How; model.config.rope_scaling sets a scaling's numbers instead."""

    def __post_init__(self) -> None:
        if (self.positions is None) != (self.rope_scaling is None):
            missing, given = ("rope_scaling", "positions") if self.rope_scaling is None else ("positions", "rope_scaling")
            example = {"rope_scaling": "yarn", "positions": "data.max_length's value"}[missing]
            rule = f"must be given with model.{given}"
            raise ConfigError(f"model.{missing}", rule, got="null", fix=f"Set it to {example}, or leave both out.")

    @property
    def config_options(self) -> dict[str, Any]:
        """How its transformers config is read, beside `config`: of models.load.load_config."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "positions": self.positions,
            "rope_scaling": self.rope_scaling,
        }

    @property
    def base_name(self) -> str:
        """What an adapter says of the model that it was trained on. With others merged into that, it is neither a path nor an id:
        other programs would load the model there without them, and not say so."""
        path = self.path or ""
        return f"{path} with {', '.join(self.merged_adapters)} merged" if self.merged_adapters else path

    @property
    def adds_tokens(self) -> bool:
        return bool(self.new_tokens) or self.resize_vocab
