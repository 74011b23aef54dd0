"""LoRA on the direction of each row of a weight, with its length trained beside it (Liu et al. 2024, arXiv 2402.09353).

The length of the row that LoRA has changed is a constant in the backward pass (section 4.3 of the paper; PEFT does so too).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from raytune_llm.models.adapters.lora import lora, ranks_fit
from raytune_llm.models.adapters.method import Kept, Method
from raytune_llm.models.quantization.base import Quantization
from raytune_llm.models.stored import Stored


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, LoraConfig) and saved.use_dora


@torch.no_grad()
def measure_stored(model: nn.Module, key: str, quantization: Quantization | None) -> None:
    """Lengths of the rows of weights that are still in their files, where PEFT has measured what stands in their place."""
    for module in model.modules():
        if not isinstance(module, LoraLayer) or key not in module.lora_magnitude_vector:
            continue
        weight: Any = module.get_base_layer().weight
        if isinstance(weight, Stored):
            lengths: Any = module.lora_magnitude_vector[key]
            lengths.weight.copy_(torch.linalg.norm(weight.read(torch.device("cpu")), dim=1))


class Lengths(DoraLinearLayer):
    """PEFT's magnitudes of a linear layer, without its product of B and A: no tensor of the weight's size is made."""

    @classmethod
    def instead_of(cls, module: DoraLinearLayer) -> Lengths:
        lengths = cls(module.fan_in_fan_out)
        lengths.weight = module.weight
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
        """What is added to the base layer's output. base_result: that output; without it (after dropout) the base layer's product
        with x is computed here."""
        weight_NK = base_layer.weight.T if self.fan_in_fan_out else base_layer.weight
        if base_result is None:
            base_result = F.linear(x, weight_NK)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        factor_N = self.weight / row_lengths(weight_NK, lora_A.weight, lora_B.weight, scaling)
        # The sum is all that the backward pass needs: of (factor - 1) * base + factor * lora, both would be saved.
        return factor_N * (base_result + scaling * lora_B(lora_A(x))) - base_result


@torch.no_grad()
def row_lengths(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float) -> Tensor:
    """The lengths of the rows of W + s B A, [N], in float32 at least. A row's square is |w|^2 + 2 s b (A w) + s^2 b (A A^T) b."""
    exact = torch.promote_types(weight_NK.dtype, torch.float32)
    a_RK = a_RK.to(weight_NK.dtype)
    dots_NR, gram_RR, b_NR = (weight_NK @ a_RK.T).to(exact), (a_RK @ a_RK.T).to(exact), b_NR.to(exact)
    changed_N = ((2 * scaling * dots_NR + scaling**2 * (b_NR @ gram_RR)) * b_NR).sum(1)
    return (torch.linalg.vector_norm(weight_NK, dim=1, dtype=exact).square() + changed_N).clamp_min(0).sqrt()


def put_lengths(model: nn.Module, key: str) -> None:
    """Linear layers compute lengths by `Lengths`; embeddings and quantized layers stay PEFT's."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and key in module.lora_magnitude_vector:
            theirs = module.lora_magnitude_vector[key]
            is_plain = type(module.get_base_layer()) in (nn.Linear, Conv1D)  # PEFT unpacks a quantized base's weights
            if type(theirs) is DoraLinearLayer and is_plain:
                module.lora_magnitude_vector[key] = Lengths.instead_of(theirs)


KEPT = Kept(alone=True, outputs=1)
"""The sum of what the base layer gave and what A and B did: the magnitudes' gradient needs it."""
DORA = Method(
    config=partial(lora, use_dora=True), describes=describes, check=ranks_fit, begin=measure_stored, placed=put_lengths, kept=KEPT
)
