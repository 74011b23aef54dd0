"""Losses of a reward model, which scores both answers of a pair at their last token. The chosen one should score higher."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor | None = None) -> Tensor:
    """-log s(chosen - rejected - margin): one loss per pair [P], unreduced (Bradley and Terry 1952; margin: Touvron et al. 2023,
    arXiv 2307.09288).

    Scores are logits. margin_P: by how much the chosen answer should score higher, in the same unit.
    """
    gap_P = chosen_P - rejected_P
    return -F.logsigmoid(gap_P if margin_P is None else gap_P - margin_P)


def centering(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """(chosen + rejected)^2: one value per pair [P], to add with a small weight. It keeps scores around 0, which Bradley-Terry
    leaves open (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return (chosen_P + rejected_P).square()


def reward_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Sums and counts over pairs: `accuracy` (a tie is wrong) and `margin`, chosen minus rejected score. No gradient."""
    gap_P = (chosen_P - rejected_P).detach()
    return {"accuracy": ((gap_P > 0).to(gap_P.dtype).sum(), len(gap_P)), "margin": (gap_P.sum(), len(gap_P))}
