from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import section


@section
class NoQuantization:
    name: Literal["none"]
    replaces_layers: ClassVar[bool] = False
    """Whether linear layers are replaced."""
    trains_base: ClassVar[bool] = True
    """Whether the model's weights can be trained with it."""


@section
class FP8:
    """Linear layers compute in FP8 with one scale per row. Frozen weights are stored in FP8; trained weights keep their type. It
    needs a Hopper GPU (sm_90) or a later one."""

    name: Literal["fp8"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = True
    skip_modules: Literal["auto"] | list[str]
    """Linear layers that stay in the run's precision, by the last part of their names. auto: the q, k and v projections, where
    FP8 raises the loss most for what it gains in speed. []: none."""


@section
class NF4:
    """QLoRA (Dettmers et al. 2023): frozen weights in 4-bit NF4, products in the run's precision. It needs bitsandbytes."""

    name: Literal["bnb_nf4"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class FP4:
    """Frozen weights in 4-bit floating point, products in the run's precision. It is coarser than bnb_nf4, since weights are
    normally distributed. It needs bitsandbytes."""

    name: Literal["bnb_fp4"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class Int8:
    """LLM.int8 (Dettmers et al. 2022): frozen weights in 8 bits, products in the run's precision. It needs bitsandbytes."""

    name: Literal["bnb_int8"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class HQQ:
    """Half-quadratic quantization: frozen weights in 4 bits, with a fitted scale and zero point for every 64 of them. Products
    are in the run's precision. It needs hqq."""

    name: Literal["hqq"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


QuantizationConfig = Annotated[NoQuantization | FP8 | NF4 | FP4 | Int8 | HQQ, Field(discriminator="name")]
