"""Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989) for norms, gated MLPs and rotary positions, layer by layer.

A module is replaced by one with the same name and weights, so that adapters, strategies and files see no difference.
transformers' classes are not patched, since other models of the process use them. Modules that compute adapters in groups
(grouped.py) are kept.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.models.adapters.grouped import ATTENTIONS, MLPS, SILU, GroupedAttention, InPlaceOf

NORMS = {f"{family}RMSNorm": (0.0, "llama") for family in ("Llama", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")}
NORMS |= {f"{family}RMSNorm": (1.0, "gemma") for family in ("Gemma", "Gemma2", "Gemma3")}
"""Class of transformers -> (number that is added to the weight, Liger's casting mode)."""


def check_liger(model: PreTrainedModel, device_type: str) -> None:
    setting = "model.liger_kernel"
    if device_type != "cuda":
        raise ConfigError(setting, "must be false without a GPU: its kernels are Triton's", got=True, fix="Leave it out.")
    if find_spec("liger_kernel") is None:
        raise ResourceError(f"{setting} needs liger-kernel", "pip install 'raytune-llm[liger]'")
    if not any(type(module).__name__ in NORMS for module in model.modules()):
        rule = f"must be false for {model.config.model_type}, whose layers it has no kernels for here"
        raise ConfigError(setting, rule, got=True, fix="Leave it out.")


def with_liger(model: PreTrainedModel, device_type: str) -> None:
    """Give a model, and the adapters in it, Liger's layers."""
    check_liger(model, device_type)
    for made in (_of_block, _of_norm):  # attention holds norms
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if (other := made(child)) is not None:
                    setattr(parent, name, other)
    for module in model.modules():
        if isinstance(module, GroupedAttention):
            module.rotate = rotate


def _of_block(module: Any) -> nn.Module | None:
    kind = type(module).__name__
    if kind in MLPS and type(module.act_fn).__name__ in SILU:
        return LigerMLP(module)
    return GroupedAttention(module) if kind in ATTENTIONS else None


def _of_norm(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    return LigerNorm(module, *NORMS[kind]) if kind in NORMS else None


class LigerNorm(nn.Module):
    def __init__(self, norm: nn.Module, offset: float, casting: str) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.offset, self.casting = offset, casting
        self.eps: Any = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
        self.train(norm.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.ops import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.eps, self.offset, self.casting, False)


class LigerMLP(InPlaceOf):
    """down_proj(silu(gate_proj(x)) * up_proj(x))"""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.ops import LigerSiLUMulFunction

        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(hidden_states), self.up_proj(hidden_states)))


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    found: Any = LigerRopeFunction.apply(query, key, cos.to(torch.float32), sin.to(torch.float32))
    return found
