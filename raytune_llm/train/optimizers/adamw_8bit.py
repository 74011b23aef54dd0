from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, adamw_step, counted
from raytune_llm.train.optimizers.groups import Trained, by_decay

SMALL, BLOCK = 4096, 256
"""The number of values from which a tensor has 8-bit moments, and the values of a block. config/optimizer.py has the same, to
estimate memory."""


def adamw_8bit(
    trained: Sequence[Trained],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    paged: bool,
    fused: bool,
) -> torch.optim.Optimizer:
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        raise ResourceError("optimizer=adamw_8bit needs bitsandbytes", "Install it: pip install bitsandbytes.") from None
    if paged and any(one.parameter.is_cpu for one in trained):
        raise ConfigError(
            "optimizer.paged", "needs a CUDA GPU, whose driver moves the pages", got=True, fix="Set optimizer=adamw_8bit."
        )
    groups = by_decay(trained, weight_decay)
    return AdamW8bit(groups, {"lr": lr, "betas": (beta1, beta2), "eps": eps}, functional=bnb, paged=paged)


class AdamW8bit(ByTensor):
    """AdamW by bitsandbytes' kernels (Dettmers et al. 2021), with state that can be sharded and saved like any other.

    A moment is stored as an index into a table of 256 values (signed for first moments), which is multiplied by the largest value
    of its block.
    """

    def __init__(self, groups: Any, defaults: dict[str, Any], *, functional: Any, paged: bool) -> None:
        super().__init__(groups, defaults)
        self.functional, self.paged = functional, paged
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        numel = torch.Size(shape).numel()
        if numel < SMALL:
            return {"step": COUNT, "exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}
        blocks = ((-(-numel // BLOCK),), torch.float32)
        codes = (shape, torch.uint8)
        return {"step": COUNT, "exp_avg": codes, "exp_avg_sq": codes, "exp_avg_max": blocks, "exp_avg_sq_max": blocks}

    def zeros(self, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.paged and dtype == torch.uint8:
            return self.functional.get_paged(*shape, dtype=dtype, device=parameter.device).zero_()
        return super().zeros(parameter, shape, dtype)

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        beta1, beta2 = group["betas"]
        count = counted(state)
        if weight.numel() < SMALL:
            adamw_step(weight, gradient, state, group, count)
            return
        table, table_sq = self.tables_on(weight.device)
        held = (weight, state["exp_avg"], state["exp_avg_sq"])
        dense = [tensor.contiguous() for tensor in held]  # copies only if an adapter is a slice of a bank
        self.functional.optimizer_update_8bit_blockwise(
            "adam",
            gradient.contiguous(),
            *dense,
            beta1,
            beta2,
            0.0,
            0.0,
            group["eps"],
            count,
            group["lr"],
            table,
            table_sq,
            state["exp_avg_max"],
            state["exp_avg_sq_max"],
            group["weight_decay"],
        )
        for tensor, stepped in zip(held, dense, strict=True):
            if stepped is not tensor:
                tensor.copy_(stepped)

    def tables_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.tables:
            signed, unsigned = (self.functional.create_dynamic_map(signed=signed).to(device) for signed in (True, False))
            self.tables[device] = (signed, unsigned)
        return self.tables[device]
