from __future__ import annotations

from transformers import PreTrainedModel


def train_everything(model: PreTrainedModel, *, scores: bool = False) -> PreTrainedModel:
    """Full fine-tuning: every weight is trained."""
    return model.requires_grad_(True)
