from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, PositiveFloat, section

Beta = Annotated[float, Field(ge=0, lt=1)]


@section
class AdamW:
    """Loshchilov & Hutter 2017. Weight decay leaves out vectors (norms and biases)."""

    name: Literal["adamw"]
    lr: PositiveFloat
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat
    weight_decay: NonNegativeFloat


OptimizerConfig = AdamW
