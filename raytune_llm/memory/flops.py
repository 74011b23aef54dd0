"""FLOPs per trained token, and the peak FLOP/s of GPUs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from raytune_llm.models.build import compute_dtype
from raytune_llm.models.layers import frozen_first, heads_of, layers
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import QuantizedLinear, packed_shapes

COPY, ORIGINAL = ".modules_to_save.", ".original_module."
"""In names of weights: of a module's copy, which is trained in its place, and of what it stands in the place of."""
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "B200": 2250e12,
}
"""Part of a GPU's name -> its peak dense bf16 FLOP/s by the maker. The first match counts."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """FLOPs of training by the convention of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B): those of the model, regardless
    of recomputation, lower precision, and logits that are skipped because their tokens are not trained."""

    per_token: float
    """Per weight: 2 forward, 2 for the gradient of its input, and 2 for its own gradient if it is trained. That is 4N for LoRA
    and 6N for full fine-tuning. Layers before the first trained one count only their forward pass. Embeddings are looked up, so
    they don't count; of experts, only those that a token visits count."""
    per_pair: float
    """Per query-key pair, over all layers: 4 forward and 8 backward for each query head and dimension. A document of L tokens has
    L (L + 1) / 2 pairs. Sliding windows are not subtracted."""
    of_head: float = 0.0
    """The head's part of per_token. Training computes the head for trained tokens only."""
    of_first: float = 0.0
    """The part of per_token of the layers before the first trained one."""

    def of(self, tokens: float, attention_pairs: float) -> float:
        return tokens * self.per_token + attention_pairs * self.per_pair

    def at_least(self, tokens: float, trained_tokens: float, *, first_layers_known: bool) -> float:
        """The FLOPs that a run can't avoid. first_layers_known: the output of layers before the first trained one is kept from
        earlier passes over the same tokens."""
        of_layers = self.per_token - self.of_head - (self.of_first if first_layers_known else 0.0)
        return tokens * of_layers + trained_tokens * self.of_head


def operations(policy: Policy, config: Any) -> Operations:
    return operations_of(policy, policy.base, config)


def operations_of(model: nn.Module, base: PreTrainedModel, config: Any) -> Operations:
    """model: the base with its adapters, with weights or without."""
    output = base.get_output_embeddings()
    head = set() if output is None else set(output.parameters())
    blocks, first = layers(model), frozen_first(base)
    forward_alone = {part for layer in first for part in (*layer.parameters(), *layer.modules())}
    visited = getattr(config.get_text_config(), "num_experts_per_tok", None)

    def of(part: nn.Parameter | nn.Module, shape: Sequence[int]) -> float:
        trained = isinstance(part, nn.Parameter) and part.requires_grad
        share = visited / shape[0] if len(shape) == 3 and visited else 1  # transformers keeps experts as [E, M, K]
        return 2 * (1 if part in forward_alone else 2 + trained) * share * math.prod(shape)

    each = {part: of(part, shape) for part, shape in _multiplied(model, head)}
    heads, width = heads_of(config)
    return Operations(
        per_token=sum(each.values()),
        per_pair=4 * heads * width * (3 * len(blocks) - 2 * len(first)),
        of_head=sum(each.get(weight, 0.0) for weight in head),
        of_first=sum(found for part, found in each.items() if part in forward_alone),
    )


def _multiplied(model: nn.Module, head: Set[nn.Parameter]) -> Iterator[tuple[nn.Parameter | nn.Module, Sequence[int]]]:
    """The weights that a pass multiplies with and their shapes; of quantized ones those of what they stand for."""
    packed = packed_shapes(model)
    copied = {name.partition(COPY)[0] for name, _ in model.named_parameters() if COPY in name}
    looked_up = {weight for module in model.modules() if isinstance(module, nn.Embedding) for weight in module.parameters()}
    for name, weight in model.named_parameters():
        replaced = ORIGINAL in name and name.partition(ORIGINAL)[0] in copied
        if weight.ndim >= 2 and not replaced and (weight in head or weight not in looked_up):
            yield weight, packed.get(weight, weight.shape)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            yield module, (module.out_features, module.in_features)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak FLOP/s; None if it is not in PEAK_FLOPS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def measured_flops(size: int = 1024, repeats: int = 8) -> float:
    """Measured FLOP/s of products of square matrices [size, size], in training's compute type, on the first GPU or the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype("auto", device)
    size = 8 * size if device.type == "cuda" else size
    left = torch.ones(size, size, device=device, dtype=dtype)
    product = left @ left
    float(product.sum())
    began = time.perf_counter()
    for _ in range(repeats):
        product = left @ left
    float(product.sum())
    return repeats * 2 * size**3 / (time.perf_counter() - began)
