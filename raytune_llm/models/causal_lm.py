"""A language model as the stages see it: what it says about the trained tokens of a batch, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytune_llm.records import Batch

TokenFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits_NV, targets_N) -> a tensor whose first dimension is N."""


class CausalLM(nn.Module):
    """Applies a function to the logits of the trained tokens, some thousand tokens at a time.

    Logits of other tokens are never computed, and those of all trained tokens never exist at once: where more than one chunk is
    needed, each is computed again in the backward pass.

    It is the root that a strategy wraps, so that one call of it is one forward pass of everything it shards.
    """

    def __init__(self, model: nn.Module, *, compute: torch.dtype = torch.float32, chunk_tokens: int = 2048) -> None:
        """Matrix products run in `compute`, whatever the weights are kept in."""
        super().__init__()
        self.model = model
        self.compute = compute
        self.chunk_tokens = chunk_tokens

    @property
    def base(self) -> Any:
        """The transformers model, with or without adapters in its layers."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def forward(self, batch: Batch, token_function: TokenFunction) -> Tensor:
        with torch.autocast(batch.ids_BT.device.type, self.compute, enabled=self.compute != torch.float32):
            return self._forward(batch, token_function)

    def _forward(self, batch: Batch, token_function: TokenFunction) -> Tensor:
        base = self.base
        hidden_BTD = base.base_model(
            input_ids=batch.ids_BT,
            position_ids=batch.positions_BT,
            cu_seqlens_S=batch.cu_seqlens_S,
            max_seqlen=batch.max_seqlen,
            use_cache=False,
        ).last_hidden_state
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.trained_N)
        targets_N = batch.labels_BT.flatten().index_select(0, batch.trained_N)
        head, scale, softcap = base.get_output_embeddings(), *_logit_changes(base.config)

        def of_chunk(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
            logits_NV = head(hidden_ND)
            if scale is not None:
                logits_NV = logits_NV * scale
            if softcap is not None:
                logits_NV = softcap * torch.tanh(logits_NV / softcap)
            return token_function(logits_NV, targets_N)

        chunks = list(zip(hidden_ND.split(self.chunk_tokens), targets_N.split(self.chunk_tokens), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([of_chunk(*chunk) for chunk in chunks])
        return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def _logit_changes(config: Any) -> tuple[float | None, float | None]:
    """What a few families do to the head's output: Granite divides, Cohere multiplies, Gemma caps."""
    divided = getattr(config, "logits_scaling", None)
    scale = 1 / divided if divided else getattr(config, "logit_scale", None)
    return scale, getattr(config, "final_logit_softcapping", None)
