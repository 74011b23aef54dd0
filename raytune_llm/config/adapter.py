"""What is trained of a model: all weights, or an adapter. Other modules ask the section, never its name."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import PositiveInt, section

Dropout = Annotated[float, Field(ge=0, lt=1)]


@section
class NoAdapter:
    """Full fine-tuning."""

    name: Literal["none"]

    trains_base: ClassVar[bool] = True
    """Base weights are trained. If not, they are frozen, and final/ holds an adapter."""
    reads_base_weights: ClassVar[bool] = False
    """It reads the weights of its layers, beside calling them."""
    trains_tokens: ClassVar[bool] = False
    """It can have embeddings of tokens that the model lacks."""
    mixes: ClassVar[bool] = False
    """Rows with different adapters of this method can share a batch, as in serving."""
    path: ClassVar[str | None] = None
    """The saved adapter that a run continues."""
    dropout: ClassVar[float] = 0.0

    @property
    def starts_at_base(self) -> bool:
        """Whether the policy equals the base model before its first step, and at any step with the adapter disabled."""
        return False


@section
class Layered:
    """Settings of all adapters on linear layers."""

    dropout: Dropout
    targets: Literal["all-linear"] | list[str]
    """Names of the linear layers, by their last part; all-linear takes every one but the head."""
    last_layers: PositiveInt | None
    """Only the last N layers of the model get an adapter, and the backward pass ends there; null: all layers."""
    path: str | None
    """A saved adapter of this method to continue, with its own rank, targets and layers."""

    trains_base: ClassVar[bool] = False
    reads_base_weights: ClassVar[bool] = False
    trains_tokens: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    @property
    def starts_at_base(self) -> bool:
        return self.path is None


@section
class LowRank(Layered):
    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)]

    trains_tokens: ClassVar[bool] = True


@section
class LoRA(LowRank):
    """Hu et al. 2021 (arXiv 2106.09685): W + alpha / rank * B A, with A and B trained."""

    name: Literal["lora"]

    mixes: ClassVar[bool] = True


@section
class RsLoRA(LowRank):
    """Kalajdzievski 2023 (arXiv 2312.03732): W + alpha / sqrt(rank) * B A, so that higher ranks learn as fast as lower ones."""

    name: Literal["rslora"]

    mixes: ClassVar[bool] = True


@section
class DoRA(LowRank):
    """Liu et al. 2024 (arXiv 2402.09353): m * V / |V| by row with V = W + alpha / rank * B A, and m trained with A and B."""

    name: Literal["dora"]

    reads_base_weights: ClassVar[bool] = True


@section
class OFT(Layered):
    """Qiu et al. 2023 (arXiv 2306.07280), as in Qiu et al. 2025 (arXiv 2506.19847): W R, where R rotates blocks of inputs.

    Each block is the Cayley transform of a skew-symmetric matrix, whose part above the diagonal is trained.
    """

    name: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)]
    """Inputs of a block; must divide each layer's inputs. There are (block_size - 1) / 2 parameters an input."""


@section
class SavedAdapter:
    """An adapter of any method in a folder, used as it is. Only code makes one; it is not a setting."""

    path: str
    setting: str
    """The setting that names the folder, for errors."""

    name: ClassVar[str] = "saved"
    trains_base: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    starts_at_base: ClassVar[bool] = False


AdapterConfig = Annotated[NoAdapter | LoRA | RsLoRA | DoRA | OFT, Field(discriminator="name")]
