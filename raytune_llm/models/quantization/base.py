"""The protocol of a quantization, and the frozen layer that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

SkipModules = Literal["auto"] | Sequence[str]
"""Linear layers that stay in the run's precision, by the last part of their names. auto: the projections of queries, keys and
values."""


HELD_ROWS = 1024
"""Of a weight, that are read out of its quantization at a time."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer with quantized weights [N, K]. They are buffers, which are neither trained nor saved. For strategies
    that shard parameters, `shard` turns the one-byte buffers into parameters."""

    HELD: ClassVar[tuple[str, ...]]
    """The names of its buffers, in the order in which products take them."""
    product: Callable[..., Tensor]
    """(x [M, K], *weights()) -> [M, N], without autograd."""
    transposed: Callable[..., Tensor]
    """(grad [M, N], *weights()) -> [M, K], without autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._types: dict[str, torch.dtype] = {}
        """Name -> dtype of each floating-point buffer that `shard` stores as uint8."""

    def unpacked_product(self, x_MK: Tensor) -> Tensor:
        """x @ weight.T, [M, N], without autograd. Computed in x's dtype, even if the layer's own products are in another one."""
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, ...]:
        return tuple(self._held(name) for name in self.HELD)

    def _held(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        return tensor.view(self._types[name]) if name in self._types else tensor

    def shard(self) -> None:
        """Turn the buffers with one byte per element, which are nearly all of the memory, into frozen integer parameters, so that
        a strategy shards them. Scales with more bytes stay buffers. No strategy casts integer parameters or buffers."""
        for name in self.HELD:
            tensor = self.get_buffer(name)
            if tensor.element_size() == 1:
                delattr(self, name)
                if tensor.is_floating_point():
                    self._types[name] = tensor.dtype
                    tensor = tensor.view(torch.uint8)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.flatten(0, -2), self, *self.weights()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class UnpackedLinear(QuantizedLinear):
    """Products are computed in the activations' dtype. The weight is dequantized once in the forward pass and once in the
    backward pass, and not kept in between."""

    times: Callable[..., Tensor]
    """(x [M, K], *weights(), transposed=False) -> x @ weight.T [M, N]; or (x [M, N], *weights(), transposed=True) -> x @ weight
    [M, K]. A custom op, since torch.compile would otherwise keep the dequantized weight for the backward pass."""

    def unpacked_product(self, x_MK: Tensor) -> Tensor:
        return self.product(x_MK, *self.weights())

    @classmethod
    def product(cls, x_MK: Tensor, *held: Tensor) -> Tensor:
        return cls.times(x_MK, *held, transposed=False)

    @classmethod
    def transposed(cls, grad_MN: Tensor, *held: Tensor) -> Tensor:
        return cls.times(grad_MN, *held, transposed=True)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, layer: QuantizedLinear, *weights: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*weights)
        return layer.product(x_MK, *weights)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> Any:  # type: ignore[override]
        return ctx.layer.transposed(grad_MN, *ctx.saved_tensors), None, *[None] * len(ctx.saved_tensors)


@dataclass(frozen=True)
class Quantization(ABC):
    """A quantization of linear layers' weights or products. Made from its config section."""

    layer: ClassVar[type[QuantizedLinear]]
    """Replaces a frozen linear layer."""
    trained_layer: ClassVar[type[nn.Module] | None] = None
    """Replaces a trained layer; None if trained layers are not supported."""
    bits_per_weight: ClassVar[float]
    """The bits per weight that `layer` stores, including scales."""
    package: ClassVar[str | None] = None
    """The package that must be installed on the machine that computes; None if none."""
    extra: ClassVar[str] = "nf4"
    """The extra of this project that installs `package`."""

    replaces_experts: ClassVar[Callable[[nn.Module, str], None] | None] = None
    """(module, name): quantizes the experts of a mixture, one parameter [E, N, K], in place; None if that is not supported."""
    bits_per_expert_weight: ClassVar[float | None] = None
    """The bits per weight of experts, including scales; None if they are `bits_per_weight`."""

    skip_modules: SkipModules = ()

    def held(self, weight_NK: Tensor) -> Tensor:
        """The weight of a linear layer after quantizing and dequantizing it, [N, K] float32."""
        outputs, inputs = weight_NK.shape
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(weight_NK.detach(), requires_grad=False)
        quantized = self.layer(linear)
        parts = []
        for start in range(0, outputs, HELD_ROWS):
            rows_RN = weight_NK.new_zeros(min(HELD_ROWS, outputs - start), outputs)
            rows_RN.diagonal(start).fill_(1)
            parts.append(quantized.transposed(rows_RN, *quantized.weights()).float())
        return torch.cat(parts)

    @property
    def expert_bits(self) -> float:
        """The bits per weight of experts, including scales."""
        return self.bits_per_weight if self.bits_per_expert_weight is None else self.bits_per_expert_weight

    @staticmethod
    @abstractmethod
    def lacks(device_type: str, capability: tuple[int, int]) -> str | None:
        """Why it can't run on a device of this type and CUDA compute capability; None if it can."""

    @abstractmethod
    def misfit(self, linear: nn.Linear) -> str | None:
        """Why this layer can't be quantized; None if it can."""
