"""silu(gate + its low-rank part) * (up + its low-rank part), and its gradients, each in one pass over the activations.

The low-rank parts low @ b.T are never written to memory. Each tile of them is computed and added to the tile of gate or up in
registers, which saves reading and writing gate and up once more.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_RANK = 64
"""The largest rank: each program of the kernels keeps a tile's low-rank factors in registers."""


@torch.library.custom_op("raytune_llm::gated", mutates_args=())
def gated(gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor) -> Tensor:
    """[M, I]. low_MR has the columns of gate, then those of up: R = G + U."""
    if _has_kernel(gate_MI):
        from raytune_llm.models.adapters.gated_kernels import forward

        return forward(gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    gate, up = _whole(gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    return F.silu(gate) * up


@gated.register_fake
def _(gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor) -> Tensor:
    return torch.empty_like(gate_MI)


@torch.library.custom_op("raytune_llm::gated_backward", mutates_args=())
def gated_backward(
    grad_MI: Tensor, gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and `gated`'s output [M, I], which the caller thus need not have saved."""
    if _has_kernel(gate_MI):
        from raytune_llm.models.adapters.gated_kernels import backward

        return backward(grad_MI, gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    gate, up = _whole(gate_MI, up_MI, low_MR, gate_b_IG, up_b_IU)
    share = torch.sigmoid(gate)
    activated = gate * share
    return grad_MI * up * share * (1 + gate * (1 - share)), grad_MI * activated, activated * up


@gated_backward.register_fake
def _(
    grad_MI: Tensor, gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate_MI), torch.empty_like(gate_MI), torch.empty_like(gate_MI)


def _whole(gate_MI: Tensor, up_MI: Tensor, low_MR: Tensor, gate_b_IG: Tensor, up_b_IU: Tensor) -> tuple[Tensor, Tensor]:
    gate_low, up_low = low_MR.split([gate_b_IG.shape[1], up_b_IU.shape[1]], dim=1)
    return torch.addmm(gate_MI, gate_low, gate_b_IG.T), torch.addmm(up_MI, up_low, up_b_IU.T)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _has_triton(x.get_device())


@lru_cache
def _has_triton(gpu: int) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(gpu) >= (8, 0)
