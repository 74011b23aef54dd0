"""Weights or their products in fewer bits: name -> what takes the place of a linear layer. Results stay in the activations' type.

The layers under adapters are replaced after those are in place, so PEFT's own layers carry on around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.models.stored import Stored

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
NF4_BLOCK, SCALES_BLOCK = 64, 256
QUERIES_KEYS_VALUES = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv"}
"""The layers that make them, in the models that transformers has."""
SkipModules = Literal["auto"] | Sequence[str]
Found = tuple[nn.Module, str, nn.Linear]
"""A layer with its parent and its name there."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer. Its weights are buffers: nothing here is trained or saved."""

    HELD: ClassVar[tuple[str, ...]]
    """The names of its buffers, in the order in which products take them."""
    product: Callable[..., Tensor]
    """(x [M, K], *weights()) -> [M, N], without autograd."""
    transposed: Callable[..., Tensor]
    """(grad [M, N], *weights()) -> [M, K], likewise."""

    def weights(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(name) for name in self.HELD)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.flatten(0, -2), self, *self.weights()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias


class FP8Linear(QuantizedLinear):
    """Products in FP8, with a scale a row on either side (Micikevicius et al. 2022, arXiv 2209.05433).

    Forward sums over inputs and backward over outputs, and tensor cores want the summed dimension last; so the weight is held
    twice, each time with the scales that fit. Together they take what it took in bf16.
    """

    HELD = ("forward_weight", "forward_scale", "backward_weight", "backward_scale")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight_NK = linear.weight.detach()
        for name, matrix in (("forward", weight_NK), ("backward", weight_NK.T.contiguous())):
            quantized, scale = _rows_in_fp8(matrix)
            self.register_buffer(f"{name}_weight", quantized, persistent=False)
            self.register_buffer(f"{name}_scale", scale.T.contiguous(), persistent=False)

    @staticmethod
    def product(x_MK: Tensor, weight_NK: Tensor, scale_1N: Tensor, transposed_KN: Tensor, transposed_scale_1K: Tensor) -> Tensor:
        return _fp8_product(x_MK, weight_NK, scale_1N)

    @staticmethod
    def transposed(
        grad_MN: Tensor, weight_NK: Tensor, scale_1N: Tensor, transposed_KN: Tensor, transposed_scale_1K: Tensor
    ) -> Tensor:
        return _fp8_product(grad_MN, transposed_KN, transposed_scale_1K)


def _fp8_product(x_MK: Tensor, weight_NK: Tensor, scale_1N: Tensor) -> Tensor:
    rows, scale_M1 = _rows_in_fp8(x_MK)
    return torch._scaled_mm(rows, weight_NK.T, scale_a=scale_M1, scale_b=scale_1N, out_dtype=x_MK.dtype, use_fast_accum=True)


def _rows_in_fp8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row over its largest magnitude, and what to multiply it with again, [M, 1] float32."""
    scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x_MK.float() / scale_M1).to(FP8), scale_M1


class NF4Linear(QuantizedLinear):
    """Weights in four bits, blocks of 64 with a scale each, held in eight bits (Dettmers et al. 2023, arXiv 2305.14314).

    Products are in the activations' type: the weight is unpacked once forward and once backward, and not kept.
    """

    HELD = ("packed", "scales", "scales_of_scales", "code_of_scales", "mean_scale", "shape")

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        try:
            from bitsandbytes.functional import quantize_4bit
        except ImportError:
            raise ResourceError(
                "quantization=bnb_nf4 needs bitsandbytes", "Install it: pip install 'raytune-llm[gpu]'."
            ) from None
        packed, state = quantize_4bit(linear.weight.detach(), quant_type="nf4", blocksize=NF4_BLOCK, compress_statistics=True)
        shape = torch.empty(1, dtype=torch.int8, device=packed.device).expand(linear.weight.shape)  # holds nothing
        held = (packed, state.absmax, state.state2.absmax, state.state2.code, state.offset, shape)
        for name, tensor in zip(self.HELD, held, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @staticmethod
    def product(x_MK: Tensor, *held: Tensor) -> Tensor:
        return _nf4_product(x_MK, *held, transposed=False)

    @staticmethod
    def transposed(grad_MN: Tensor, *held: Tensor) -> Tensor:
        return _nf4_product(grad_MN, *held, transposed=True)


@torch.library.custom_op("raytune_llm::nf4_product", mutates_args=())
def _nf4_product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    scales_of_scales: Tensor,
    code_of_scales: Tensor,
    mean_scale: Tensor,
    shape: Tensor,
    transposed: bool,
) -> Tensor:
    """x @ weight.T, or x @ weight. One op for the compiler, which would else keep the unpacked weight for the backward pass."""
    bnb = torch.ops.bitsandbytes
    wide = bnb.dequantize_blockwise(scales, scales_of_scales, code_of_scales, SCALES_BLOCK, torch.float32) + mean_scale
    weight = bnb.dequantize_4bit(packed, wide, NF4_BLOCK, "nf4", list(shape.shape), x.dtype)
    return x @ weight if transposed else x @ weight.T


@_nf4_product.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    scales_of_scales: Tensor,
    code_of_scales: Tensor,
    mean_scale: Tensor,
    shape: Tensor,
    transposed: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], shape.shape[1 if transposed else 0]))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, layer: QuantizedLinear, *weights: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*weights)
        return layer.product(x_MK, *weights)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> Any:  # type: ignore[override]
        return ctx.layer.transposed(grad_MN, *ctx.saved_tensors), None, *[None] * len(ctx.saved_tensors)


class TrainedFP8Linear(nn.Linear):
    """A trained linear layer with products in FP8, with a scale a row on either side; its weight and its gradient stay wide.

    Of the three products of a step, the two with the weight are in FP8; the weight's gradient, which sums over thousands of
    tokens and goes to the optimizer, is in the run's precision.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        y = _TrainedProduct.apply(input.flatten(0, -2).to(dtype), self.weight.to(dtype)).view(*input.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(dtype)


class _TrainedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        rows, scale_N1 = _rows_in_fp8(weight_NK)
        return _fp8_product(x_MK, rows, scale_N1.T)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> Any:  # type: ignore[override]
        x_MK, weight_NK = ctx.saved_tensors
        rows, scale_K1 = _rows_in_fp8(weight_NK.T.contiguous())
        return _fp8_product(grad_MN.contiguous(), rows, scale_K1.T), grad_MN.T @ x_MK


QUANTIZED: dict[str, type[QuantizedLinear] | None] = {"none": None, "fp8": FP8Linear, "bnb_nf4": NF4Linear}


TRAINED: dict[str, type[nn.Linear] | None] = {"none": None, "fp8": TrainedFP8Linear, "bnb_nf4": None}
"""What takes the place of a linear layer that is trained."""


def quantize(layers: Iterable[nn.Module], name: str, runs_on: torch.device, *, skip_modules: SkipModules = ()) -> None:
    """Replace the linear layers inside `layers`, but those named in `skip_modules`: the frozen ones, which are on the GPU by now,
    or all where all are trained."""
    if QUANTIZED[name] is None:
        return
    layers = list(layers)
    linears = linears_but(layers, skip_modules)
    if has_frozen_experts(layers):
        rule = "can't be had of a mixture of experts, whose experts are one tensor, and no linear layers"
        raise ConfigError("quantization", rule, got=name, fix="Set quantization=none.")
    if not linears:
        fix = "Set quantization=none, or name fewer in quantization.skip_modules."
        raise ConfigError("quantization", "finds no linear layer to take the place of", got=name, fix=fix)
    frozen = [found for found in linears if not found[2].weight.requires_grad]
    kind: Any = QUANTIZED[name] if frozen else TRAINED[name]
    if kind is None:
        raise ConfigError("quantization", "needs frozen weights", got=name, fix="Set adapter=lora, or quantization=none.")
    if runs_on.type != "cuda":
        raise ConfigError("quantization", "needs a GPU", got=name, fix="Set quantization=none.")
    _fits(kind, torch.cuda.get_device_capability(runs_on), [linear for _, _, linear in frozen or linears])
    replaced = frozen or linears
    linears = frozen = []  # or the wide weights would live as long as these
    replace(replaced, kind, runs_on)
    torch.cuda.empty_cache()  # what held the weights as they were loaded


def has_frozen_experts(layers: Iterable[nn.Module]) -> bool:
    """Of a mixture of experts, whose weights are tensors [E, N, K]."""
    return any(parameter.ndim == 3 and not parameter.requires_grad for layer in layers for parameter in layer.parameters())


def replace(linears: list[Found], kind: Callable[[nn.Linear], nn.Module], runs_on: torch.device) -> None:
    """A layer at a time, and the list forgets it, so that its weight goes; one that is in a file is read just before."""
    while linears:
        parent, name, linear = linears.pop()
        if kind is not TrainedFP8Linear and isinstance(linear.weight, Stored):
            linear.weight = linear.weight.read(runs_on)
        setattr(parent, name, kind(linear))


def described(layers: Iterable[nn.Module], name: str) -> str | None:
    """How many layers it took the place of, and which it left; None where it did none."""
    layers = list(layers)
    taken = [x for layer in layers for x in layer.modules() if isinstance(x, QuantizedLinear | TrainedFP8Linear)]
    left = sorted({name for *_, name in _linears(layers)})
    but = f", not for {', '.join(left)}" if left else ""
    return f"{name} for {len(taken)} linear layers{but}" if taken else None


def linears_but(layers: Iterable[nn.Module], skip_modules: SkipModules) -> list[Found]:
    """Each linear layer of the model, but those that are called as `skip_modules` has it. An adapter calls the layer inside it
    base_layer, and keeps its own in dictionaries."""
    found = _linears(layers)
    names = {name for *_, name in found}
    if skip_modules == "auto":
        skip_modules = sorted(names & QUERIES_KEYS_VALUES)
    if unknown := sorted(set(skip_modules) - names):
        fix = f"The model has {', '.join(sorted(names))}."
        raise ConfigError("quantization.skip_modules", "must name linear layers of the model", got=unknown, fix=fix)
    return [(parent, child_name, child) for parent, child_name, child, name in found if name not in skip_modules]


def _linears(layers: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Linear, str]]:
    """With what the model calls each."""
    return [
        (parent, child_name, child, f"{parent_name}.{child_name}".removesuffix(".base_layer").rpartition(".")[2])
        for layer in layers
        for parent_name, parent in layer.named_modules()
        for child_name, child in parent.named_children()
        if type(child) is nn.Linear and not isinstance(parent, nn.ModuleDict)
    ]


def _fits(kind: type[nn.Module], capability: tuple[int, int], linears: Iterable[nn.Linear]) -> None:
    """Tensor cores take FP8 with a scale a row from Hopper on, in multiples of 16."""
    if kind is NF4Linear:
        return
    if capability < (9, 0):
        raise ConfigError(
            "quantization",
            f"can't be fp8 on a GPU of compute capability {capability[0]}.{capability[1]}, below 9.0",
            fix="Set quantization=none.",
        )
    odd = [linear for linear in linears if linear.in_features % 16 or linear.out_features % 16]
    if odd:
        width = f"{odd[0].in_features} x {odd[0].out_features}"
        rule = f"can't be fp8 for a layer of {width}, no multiples of 16"
        raise ConfigError("quantization", rule, fix="Set quantization=none.")
