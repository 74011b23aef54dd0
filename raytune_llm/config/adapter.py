"""What is trained of a model: all of it, or an adapter. What others ask of the choice, they ask its section."""

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
    """Beside calling the layers that it is on, it reads their weights."""
    mixes: ClassVar[bool] = False
    """Rows with different adapters of this kind are computed in one pass, which is how they are served."""
    path: ClassVar[str | None] = None
    """The saved adapter that a run continues."""
    dropout: ClassVar[float] = 0.0

    @property
    def starts_at_base(self) -> bool:
        """Before its first step, and with its adapter switched off at any step, the policy is the base model."""
        return False


@section
class Layered:
    """What adapters on linear layers have in common."""

    dropout: Dropout
    targets: Literal["all-linear"] | list[str]
    """Names of the linear layers, by their last part; all-linear takes every one but the head."""
    last_layers: PositiveInt | None
    """At most so many of the model's layers, the last ones, get an adapter, and the backward pass ends there; null: all."""
    path: str | None
    """A saved adapter of this kind to continue; its sizes, targets and layers are then the saved ones."""

    trains_base: ClassVar[bool] = False
    reads_base_weights: ClassVar[bool] = False
    mixes: ClassVar[bool] = False

    @property
    def starts_at_base(self) -> bool:
        return self.path is None


@section
class LowRank(Layered):
    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)]


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
    """Liu et al. 2024 (arXiv 2402.09353): m * V / |V| by row with V = W + alpha / rank * B A, and m trained beside A and B."""

    name: Literal["dora"]

    reads_base_weights: ClassVar[bool] = True


@section
class OFT(Layered):
    """Qiu et al. 2023 (arXiv 2306.07280), as in Qiu et al. 2025 (arXiv 2506.19847): W R, where R turns inputs in blocks.

    Each block is the Cayley transform of a skew-symmetric matrix, whose part above the diagonal is trained.
    """

    name: Literal["oft"]
    block_size: Annotated[int, Field(ge=2)]
    """Inputs that are turned together; must divide those of each layer. Larger ones train more: (block_size - 1) / 2 an input."""


@section
class SavedAdapter:
    """An adapter of any kind in a folder, to be used as it is. For code: no setting is one."""

    path: str
    setting: str
    """That names the folder, for errors."""

    name: ClassVar[str] = "saved"
    trains_base: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    starts_at_base: ClassVar[bool] = False


AdapterConfig = Annotated[NoAdapter | LoRA | RsLoRA | DoRA | OFT, Field(discriminator="name")]
