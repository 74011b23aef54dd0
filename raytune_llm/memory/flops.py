"""FLOPs per trained token, and the peak FLOP/s of GPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from raytune_llm.memory.model import dimensions
from raytune_llm.models.build import compute_dtype
from raytune_llm.models.layers import layers
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import QuantizedLinear

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
    and 6N for full fine-tuning. Embeddings are looked up, so they don't count; of experts, only those that a token visits
    count."""
    per_pair: float
    """Per query-key pair, over all layers: 4 forward and 8 backward for each query head and dimension. A document of L tokens has
    L (L + 1) / 2 pairs. Sliding windows are not subtracted."""

    def of(self, tokens: float, attention_pairs: float) -> float:
        return tokens * self.per_token + attention_pairs * self.per_pair


def operations(policy: Policy, config: Any) -> Operations:
    """The operations of a policy. Layers before the first trained one count only their forward pass."""
    embeddings, output = policy.base.get_input_embeddings(), policy.base.get_output_embeddings()
    embedding, head = _matrix(embeddings), None if output is None else _matrix(output)
    blocks = layers(policy)
    first = [] if not _is_frozen(embeddings) else list(takewhile(_is_frozen, blocks))
    forward_alone = {*(p for layer in first for p in layer.parameters()), *(m for layer in first for m in layer.modules())}

    visited = getattr(config.get_text_config(), "num_experts_per_tok", None)

    total = 0.0
    for parameter in policy.parameters():
        if parameter.ndim < 2 or (parameter is embedding and head is not embedding):
            continue
        passes = 1 if parameter in forward_alone else 2 + parameter.requires_grad
        part = visited / len(parameter) if parameter.ndim == 3 and visited else 1  # transformers keeps experts as [E, M, K]
        total += 2 * passes * part * parameter.numel()
    for module in policy.modules():
        if isinstance(module, QuantizedLinear):
            total += 2 * (1 if module in forward_alone else 2) * module.in_features * module.out_features
    return Operations(per_token=total, per_pair=4 * dimensions(config).query * (3 * len(blocks) - 2 * len(first)))


def _matrix(part: nn.Module) -> torch.Tensor | None:
    """The weight matrix of an embedding or a head, without an adapter's extra rows; None if it is quantized."""
    return max(part.parameters(), key=torch.Tensor.numel, default=None)


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


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
