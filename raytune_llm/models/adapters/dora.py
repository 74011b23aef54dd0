"""LoRA on the direction of each row of a weight, with its length trained beside it (Liu et al. 2024, arXiv 2402.09353).

The length of the row that LoRA has changed is a constant in the backward pass (section 4.3 of the paper; PEFT does so too).
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
"""Of a quantized weight, that are unpacked at once as it is measured."""


@torch.no_grad()
def measure_stored(model: nn.Module, key: str) -> None:
    """Lengths of the rows of weights that are still in their files, where PEFT has measured what stands in their place."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or key not in module.lora_magnitude_vector:
            continue
        weight: Any = module.get_base_layer().weight
        if isinstance(weight, Stored):
            lengths: Any = module.lora_magnitude_vector[key]
            lengths.weight.copy_(torch.linalg.norm(weight.read(torch.device("cpu")), dim=1))


class Lengths(DoraLinearLayer):
    """PEFT's magnitudes of a linear layer, quantized or not, without its product of B and A: no tensor of the weight's size is
    made."""

    squares_N: Tensor | None
    """Of the lengths of a quantized weight's rows, which nothing changes."""

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
        """What is added to the base layer's output. base_result: that output; without it (after dropout) it is computed here, of
        x."""
        if base_result is None:
            base_result = base_layer(x)
        if base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        factor_N = self.weight / self.changed_lengths(base_layer, lora_A.weight, lora_B.weight, scaling, x.dtype)
        # The sum is all that the backward pass needs: of (factor - 1) * base + factor * lora, both would be saved.
        return factor_N * (base_result + scaling * lora_B(lora_A(x))) - base_result

    @torch.no_grad()
    def changed_lengths(self, base: Any, a_RK: Tensor, b_NR: Tensor, scaling: float, compute: torch.dtype) -> Tensor:
        """The lengths of the rows of W + s B A, [N], in float32 at least. compute: the type of a quantized weight's products."""
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
    """A row's square is |w|^2 + 2 s b (A w) + s^2 b (A A^T) b. dots: W A^T."""
    exact = squares_N.dtype
    dots_NR, gram_RR, b_NR = dots_NR.to(exact), (a_RK @ a_RK.T).to(exact), b_NR.to(exact)
    changed_N = ((2 * scaling * dots_NR + scaling**2 * (b_NR @ gram_RR)) * b_NR).sum(1)
    return (squares_N + changed_N).clamp_min(0).sqrt()


@torch.no_grad()
def measure_quantized(model: nn.Module, key: str, *, new: bool) -> None:
    """Once weights are held in fewer bits: the lengths of these are what the adapter changes, and what a new one begins with."""
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
    """[N], of the lengths of its rows: a few columns at a time, each the product with a row of the identity."""
    device = base.weights()[0].device
    squares_N = torch.zeros(base.out_features, device=device)
    for start in range(0, base.in_features, COLUMNS):
        rows = min(COLUMNS, base.in_features - start)
        one_hot = torch.zeros(rows, base.in_features, device=device)
        one_hot[:, start : start + rows].fill_diagonal_(1)
        squares_N += base.unpacked_product(one_hot).square().sum(0)
    return squares_N


def put_lengths(model: nn.Module, key: str) -> None:
    """Linear layers compute lengths by `Lengths`; embeddings stay PEFT's."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and key in module.lora_magnitude_vector:
            theirs = module.lora_magnitude_vector[key]
            is_plain = type(module.get_base_layer()) in (nn.Linear, Conv1D)
            if type(theirs) is DoraLinearLayer and is_plain:
                module.lora_magnitude_vector[key] = Lengths.instead_of(theirs)


KEPT = Kept(alone=True, outputs=1)
"""The sum of what the base layer gave and what A and B did: the magnitudes' gradient needs it."""


def with_lengths(method: Method) -> Method:
    """A kind of LoRA, with lengths of rows beside its A and B."""

    def begin(model: nn.Module, key: str, quantization: Quantization | None) -> None:
        method.begin(model, key, quantization)
        measure_stored(model, key)

    return replace(method, begin=begin, placed=put_lengths, quantized=measure_quantized, kept=KEPT)
