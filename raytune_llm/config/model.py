from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section
from raytune_llm.errors import ConfigError


@section
class ModelConfig:
    path: str | None
    """A local folder or a hub id; null builds the model from `config`."""
    revision: str | None
    weights: Literal["pretrained", "random"]
    """random: the same architecture with random weights, drawn with train.seed, for trials without a download."""
    config: dict[str, Any]
    """Entries of the transformers config: the whole config (with model_type) if path is null, else changes to the model's own."""
    tokenizer: str | None
    """A folder or hub id; null: the model's own; bytes: a built-in byte tokenizer with ChatML's special tokens."""
    new_tokens: list[str] | dict[str, str] | str | None
    """New tokens whose embeddings are trained, also when the rest of the run trains an adapter: a list of words, {word:
    description}, or a file with one of these. An embedding is initialized with the mean embedding of the pieces that the word, or
    its description, had before."""
    resize_vocab: bool
    """Add special tokens that data.template needs and the tokenizer lacks, and train their embeddings too."""
    trust_remote_code: bool
    merged_adapters: list[str]
    """Folders of adapters to merge into the weights, in this order, when the model is loaded. The merged model is then the base
    for everything, including a new adapter and the reference."""
    attention: Literal["auto", "varlen", "flash2", "flash3", "flash4", "flex", "sdpa"]
    """The attention back end. varlen: torch's own FlashAttention. flash2 to flash4: separate packages. auto: flash3 if it is
    installed and the GPU is a Hopper GPU (sm_90), else the first of varlen, sdpa and flex that can run."""

    shift_attn_tokens: Annotated[int, Field(ge=2, multiple_of=2)] | None
    """S2 attention for training on long rows (LongLoRA, Chen et al. 2023, arXiv 2309.12307): the number of tokens in a group. A
    token attends within its group only; for half of the heads, groups are shifted by half a group. A quarter of data.max_length
    is common. Evaluations and the saved model use full attention. null: training does too."""

    liger_kernel: bool
    """Use Liger's Triton kernels (extra `liger`) for norms, gated MLPs and rotary positions, in training on GPUs. Layers are then
    not compiled; the compiler fuses the same operations and more."""
    positions: PositiveInt | None
    """The longest text that the model must handle, in tokens. If the model has fewer positions, rope_scaling scales them by the
    smallest integer factor that suffices. null: the model's own number."""
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None
    """The scaling that `positions` applies. To set a scaling's numbers yourself, use model.config.rope_scaling instead."""

    def __post_init__(self) -> None:
        if (self.positions is None) != (self.rope_scaling is None):
            missing, given = ("rope_scaling", "positions") if self.rope_scaling is None else ("positions", "rope_scaling")
            example = {"rope_scaling": "yarn", "positions": "data.max_length's value"}[missing]
            rule = f"must be given with model.{given}"
            raise ConfigError(f"model.{missing}", rule, got="null", fix=f"Set it to {example}, or leave both out.")

    @property
    def config_options(self) -> dict[str, Any]:
        """Keyword arguments of models.load.load_config, in addition to `config`."""
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "positions": self.positions,
            "rope_scaling": self.rope_scaling,
        }

    @property
    def base_name(self) -> str:
        """The base model's name in an adapter's config. If adapters are merged into the base, the name is not a path or an id, so
        that no program silently loads the base without them."""
        path = self.path or ""
        return f"{path} with {', '.join(self.merged_adapters)} merged" if self.merged_adapters else path

    @property
    def adds_tokens(self) -> bool:
        return bool(self.new_tokens) or self.resize_vocab
