"""DoRA: LoRA changes the direction of each weight row, and its magnitude is trained too (Liu et al. 2024, arXiv 2402.09353).

The norm of W + s B A is treated as a constant in the backward pass (section 4.3 of the paper, and PEFT).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raytune_llm.models.adapters.method import Kept, Method
from raytune_llm.models.quantization.base import Quantization, QuantizedLinear
from raytune_llm.models.stored import Stored

COLUMNS = 1024
"""The number of columns of a quantized weight that are dequantized at a time to compute row norms."""


@torch.no_grad()
def measure(model: nn.Module, key: str) -> None:
    """Set a new adapter's magnitudes in float32, so that it begins as the base: PEFT computes them in the weights' type, and
    from placeholders where weights are still in files."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or key not in module.lora_magnitude_vector:
            continue
        base: Any = module.get_base_layer()
        lengths: Any = module.lora_magnitude_vector[key]
        if base.weight.is_meta:
            continue
        if isinstance(lengths, Lengths) and not isinstance(base.weight, Stored):
            a: Any = module.lora_A[key].weight
            b: Any = module.lora_B[key].weight
            lengths.weight.copy_(lengths.changed_lengths(base, a, b, module.scaling[key], torch.float32))
        else:  # B A is 0
            weight = base.weight.read(torch.device("cpu")) if isinstance(base.weight, Stored) else base.weight
            lengths.weight.copy_(torch.linalg.vector_norm(weight, dim=0 if lengths.fan_in_fan_out else 1, dtype=torch.float32))


class Lengths(DoraLinearLayer):
    """PEFT's DoRA layer for a linear layer, quantized or not, without its product of B and A: no tensor of the weight's size is
    allocated."""

    squares_N: Tensor | None
    """The squared row norms of a quantized weight, which is constant."""

    @classmethod
    def instead_of(cls, module: DoraLinearLayer) -> Lengths:
        lengths = cls(module.fan_in_fan_out)
        lengths.weight = module.weight
        lengths.register_buffer("squares_N", None, persistent=False)
        return lengths

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """The change of the base layer's output. base_result: that output; if it is None (with dropout), it is computed here from
        x."""
        if base_result is None:
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        factor_N = self.weight / self.changed_lengths(base_layer, lora_A.weight, lora_B.weight, scaling, x.dtype)
        # Written so that autograd saves only the sum: for (factor - 1) * base + factor * lora, it would save both terms.
        return factor_N * (base_result + scaling * lora_B(lora_A(x))) - base_result

    @torch.no_grad()
    def changed_lengths(self, base: Any, a_RK: Tensor, b_NR: Tensor, scaling: float, compute: torch.dtype) -> Tensor:
        """The row norms of W + s B A, [N], at least float32. compute: the dtype of a quantized weight's products."""
        if isinstance(base, QuantizedLinear):
            assert self.squares_N is not None
            a_RK = a_RK.to(compute)
            return row_lengths(self.squares_N, base.unpacked_product(a_RK).T, a_RK, b_NR, scaling)
        weight_NK = base.weight.T if self.fan_in_fan_out else base.weight
        exact = torch.promote_types(weight_NK.dtype, torch.float32)
        a_RK = a_RK.to(weight_NK.dtype)
        squares_N = torch.linalg.vector_norm(weight_NK, dim=1, dtype=exact).square()
        return row_lengths(squares_N, weight_NK @ a_RK.T, a_RK, b_NR, scaling)


def row_lengths(squares_N: Tensor, dots_NR: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """The row norms of W + s B A, [N]. The square of one is |w|^2 + 2 s b (A w) + s^2 b (A A^T) b.

    squares_N: |w|^2 of each row. dots_NR: W A^T."""
    exact = squares_N.dtype
    dots_NR, gram_RR, b_NR = dots_NR.to(exact), (a_RK @ a_RK.T).to(exact), b_NR.to(exact)
    changed_N = ((2 * scaling * dots_NR + scaling**2 * (b_NR @ gram_RR)) * b_NR).sum(1)
    return (squares_N + changed_N).clamp_min(0).sqrt()


@torch.no_grad()
def measure_quantized(model: nn.Module, key: str, *, new: bool) -> None:
    """After quantization, compute the row norms of the quantized weights. A new adapter's magnitudes begin as these."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or key not in module.lora_magnitude_vector:
            continue
        base, lengths = module.get_base_layer(), module.lora_magnitude_vector[key]
        if isinstance(base, QuantizedLinear) and isinstance(lengths, Lengths):
            lengths.squares_N = squares_of(base)
            if new:
                a: Any = module.lora_A[key].weight
                b: Any = module.lora_B[key].weight
                lengths.weight.copy_(lengths.changed_lengths(base, a, b, module.scaling[key], torch.float32))


def squares_of(base: QuantizedLinear) -> Tensor:
    """The squared row norms, [N], from a few columns at a time, which are products with rows of the identity."""
    device = base.weights()[0].device
    squares_N = torch.zeros(base.out_features, device=device)
    for start in range(0, base.in_features, COLUMNS):
        rows = min(COLUMNS, base.in_features - start)
        one_hot = torch.zeros(rows, base.in_features, device=device)
        one_hot[:, start : start + rows].fill_diagonal_(1)
        squares_N += base.unpacked_product(one_hot).square().sum(0)
    return squares_N


def put_lengths(model: nn.Module, key: str) -> None:
    """Replace PEFT's DoRA layers of linear layers by `Lengths`; those of embeddings stay."""
    modules: Any = model.modules()
    for module in modules:
        if isinstance(module, LoraLayer) and key in module.lora_magnitude_vector:
            module.reads_weights = True  # type: ignore[attr-defined]
            theirs = module.lora_magnitude_vector[key]
            is_plain = type(module.get_base_layer()) in (nn.Linear, Conv1D)
            if type(theirs) is DoraLinearLayer and is_plain:
                module.lora_magnitude_vector[key] = Lengths.instead_of(theirs)


KEPT = Kept(alone=True, outputs=1)
"""The magnitudes' gradient needs the output of the base layer plus that of A and B."""


def with_lengths(method: Method) -> Method:
    """The method (LoRA or one that initializes it differently) with trained magnitudes."""

    def begin(model: nn.Module, key: str, quantization: Quantization | None) -> None:
        method.begin(model, key, quantization)
        measure(model, key)

    return replace(method, begin=begin, placed=put_lengths, quantized=measure_quantized, kept=KEPT)
