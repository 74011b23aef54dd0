"""Norms, rotary positions and gated activations as one kernel each, for the steps of a served model that are not compiled.

A step with long prompts is computed as written, since each has another shape. There, a norm is seven passes over the hidden
states, rotary positions are five over queries and keys, and a gated activation is two. These kernels take one each, and compute
in float32 within, as compiled layers do. In compiled code the modules stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from raytune_llm.models.adapters.grouped import SILU, GroupedAttention, GroupedMLP

NORMS = {f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
"""Classes that compute weight * x / rms(x)."""


class FusedNorm(nn.Module):
    """An RMS norm, forward only."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, hidden_states: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not hidden_states.is_cuda:
            return self.plain(hidden_states)
        from raytune_llm.models import fused_kernels

        return fused_kernels.norm(hidden_states, self.plain.weight, self.plain.variance_epsilon)


def fuse(model: nn.Module) -> None:
    """Give a model that is only computed forward, in 16 bits and on a GPU, these kernels."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in NORMS:
                setattr(parent, name, FusedNorm(child))
    for module in model.modules():
        if isinstance(module, GroupedAttention):
            module.rotate = rotate
        elif isinstance(module, GroupedMLP) and type(module.act_fn).__name__ in SILU:
            module.gated = gated


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb. Where it is one kernel, query and key [1, heads, T, Dh] are changed in place."""
    if torch.compiler.is_compiling() or not query.is_cuda or query.shape[0] != 1 or cos.shape[-1] != query.shape[-1]:
        return apply_rotary_pos_emb(query, key, cos, sin)
    from raytune_llm.models import fused_kernels

    for x_1HTD in (query, key):
        fused_kernels.rotate_(x_1HTD[0], cos[0], sin[0])
    return query, key


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if torch.compiler.is_compiling() or not gate.is_cuda:
        return F.silu(gate) * up
    from raytune_llm.models import fused_kernels

    return fused_kernels.gated(gate.flatten(0, -2), up.flatten(0, -2)).view(gate.shape)
