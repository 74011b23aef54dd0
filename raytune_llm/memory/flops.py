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
"""Dense bf16 FLOP/s (the makers' figures), by a part of the GPU's name; the first that matches counts."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """FLOPs of training by the convention of Chowdhery et al. 2022 (2204.02311, appendix B): those of the model, whatever is
    recomputed, computed in fewer bits, or left out because no token trains on it."""

    per_token: float
    """Per weight: 2 forward, 2 for the gradient of its input, and 2 for its own gradient if it is trained: 4N for LoRA, 6N for
    full fine-tuning. Embeddings are looked up, not multiplied; only the experts that a token visits count."""
    per_pair: float
    """Per query-key pair, over all layers: for each query head and dimension, 4 forward and 8 backward. So a document
    of L tokens has L (L + 1) / 2 times as many, in a pack as alone. Sliding windows are not subtracted."""

    def of(self, tokens: float, attention_pairs: float) -> float:
        return tokens * self.per_token + attention_pairs * self.per_pair


def operations(policy: Policy, config: Any) -> Operations:
    """Layers below the first that trains run forward alone."""
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
    """The matrix of an embedding or a head, beside which an adapter may have rows of its own; None where it is quantized."""
    return max(part.parameters(), key=torch.Tensor.numel, default=None)


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters())


def peak_flops(device: torch.device) -> float | None:
    """None where the device is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def measured_flops(size: int = 1024, repeats: int = 8) -> float:
    """Operations a second of products of square matrices, in what training would compute in: on the first GPU, or this CPU."""
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
