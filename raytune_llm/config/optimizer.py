from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, PositiveFloat, section
from raytune_llm.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]


@section
class AdamW:
    """Loshchilov & Hutter 2017. Weight decay skips vectors (norms and biases)."""

    name: Literal["adamw"]
    needs_matrices: ClassVar[bool] = False
    """It steps by matrix, so a strategy must keep shapes."""
    lr: PositiveFloat
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat
    weight_decay: NonNegativeFloat

    def state_size(self, *, matrices: int, others: int) -> int:
        """Number of state values, given the trained parameters in matrices of the layers and elsewhere."""
        return 2 * (matrices + others)


@section
class Muon:
    """Steps along the orthogonalized momentum of a matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as large as
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so that rates and decay carry over from it. Muon takes the matrices of layers.
    AdamW trains the rest: embeddings, heads, norms and biases."""

    name: Literal["muon"]
    needs_matrices: ClassVar[bool] = True
    lr: PositiveFloat
    momentum: Beta
    nesterov: bool
    weight_decay: NonNegativeFloat
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat
    adamw_lr_factor: PositiveFloat
    """AdamW's learning rate over lr."""

    def state_size(self, *, matrices: int, others: int) -> int:
        return matrices + 2 * others


@section
class SGD:
    """Gradient descent with momentum (Sutskever et al. 2013). Weight decay is added to the gradient, and skips vectors."""

    name: Literal["sgd"]
    needs_matrices: ClassVar[bool] = False
    lr: PositiveFloat
    momentum: Beta
    nesterov: bool
    weight_decay: NonNegativeFloat

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "optimizer.nesterov", "needs a momentum", got=True, fix="Set optimizer.momentum (say 0.9), or nesterov=false."
            )

    def state_size(self, *, matrices: int, others: int) -> int:
        return matrices + others if self.momentum else 0


OptimizerConfig = Annotated[AdamW | Muon | SGD, Field(discriminator="name")]
