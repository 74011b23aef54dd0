from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytune_llm.errors import ConfigError
from raytune_llm.train.optimizers.by_tensor import COUNT, ByTensor, Layout, State, adamw_step, counted
from raytune_llm.train.optimizers.groups import Trained, by_decay


def badam(
    trained: Sequence[Trained],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    switch_every: int,
    order: str,
    outside_layers: bool,
    fused: bool,
) -> torch.optim.Optimizer:
    blocks: dict[int | None, list[nn.Parameter]] = {}
    for one in trained:
        if one.layer is not None or outside_layers:
            blocks.setdefault(one.layer, []).append(one.parameter)
    if not blocks:
        raise ConfigError("optimizer.outside_layers", "must be true where nothing within the layers is trained", got=False)
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    return BAdam(by_decay(trained, weight_decay), settings, list(blocks.values()), switch_every, ORDERS[order])


def ascending(blocks: int, lap: int) -> Sequence[int]:
    return range(blocks)


def descending(blocks: int, lap: int) -> Sequence[int]:
    return range(blocks)[::-1]


def shuffled(blocks: int, lap: int) -> Sequence[int]:
    return torch.randperm(blocks, generator=torch.Generator().manual_seed(lap)).tolist()


ORDERS: dict[str, Callable[[int, int], Sequence[int]]] = {
    "ascending": ascending,
    "descending": descending,
    "random": shuffled,
}
"""optimizer.order -> (number of blocks, number of the lap over them) -> the order of the blocks in this lap."""


class BAdam(ByTensor):
    """Luo et al. 2024, algorithm 1: AdamW on one block at a time, whose moments start from zero in each turn.

    The state of every tensor counts the run's steps, so that a resumed run knows which block's turn it is.
    """

    by_matrix = False

    def __init__(
        self,
        groups: Any,
        defaults: dict[str, Any],
        blocks: Sequence[Sequence[nn.Parameter]],
        switch_every: int,
        order: Callable[[int, int], Sequence[int]],
    ) -> None:
        super().__init__(groups, defaults)
        self.blocks, self.switch_every, self.order = blocks, switch_every, order

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Layout:
        return {"step": COUNT, "exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}

    def in_turn(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        block = set(self._block())
        return [parameter for parameter in parameters if parameter in block]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        block = set(self._block())
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in block:
                    parameter.grad = None
        super().step(closure)
        done = torch.full((), self._done() + 1.0)
        turn_ends = int(done) % self.switch_every == 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if turn_ends:
                    self.state[parameter].clear()
                self.state[parameter]["run_steps"] = done.clone()

    def update(self, weight: Tensor, gradient: Tensor, state: State, group: dict[str, Any], number: int) -> None:
        adamw_step(weight, gradient, state, group, counted(state))

    def _done(self) -> int:
        """The number of steps that the run has made."""
        kept = self.state[self.param_groups[0]["params"][0]].get("run_steps")
        return 0 if kept is None else int(kept.item())

    def _block(self) -> Sequence[nn.Parameter]:
        turn = self._done() // self.switch_every
        lap, place = divmod(turn, len(self.blocks))
        return self.blocks[self.order(len(self.blocks), lap)[place]]
