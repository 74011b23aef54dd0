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
    """Products in FP8, with a scale a row; frozen weights are held in it too, trained ones keep their type. Needs a Hopper
    GPU (sm_90) or later."""

    name: Literal["fp8"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = True
    skip_modules: Literal["auto"] | list[str]
    """Linear layers that stay in the run's precision, by the last part of their names. auto: the q, k and v projections, where
    FP8 costs most loss for its speed-up; [] for none."""


@section
class NF4:
    """QLoRA (Dettmers et al. 2023): frozen weights in four bits, products in the run's precision. Needs bitsandbytes."""

    name: Literal["bnb_nf4"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class FP4:
    """Frozen weights in four bits that are small floating-point numbers. Coarser than bnb_nf4 for weights, which are normally
    distributed. Needs bitsandbytes."""

    name: Literal["bnb_fp4"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class Int8:
    """Frozen weights in eight bits, as LLM.int8's (Dettmers et al. 2022), products in the run's precision. Needs bitsandbytes."""

    name: Literal["bnb_int8"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


@section
class HQQ:
    """Frozen weights in four bits with a fitted scale and zero for 64 of them (half-quadratic quantization), products in the
    run's precision. Needs hqq."""

    name: Literal["hqq"]
    replaces_layers: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False


QuantizationConfig = Annotated[NoQuantization | FP8 | NF4 | FP4 | Int8 | HQQ, Field(discriminator="name")]
