"""A language model as the stages see it: what it says about the trained tokens of a batch, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raytune_llm.models import attention
from raytune_llm.models.activations import HostMemory
from raytune_llm.models.head import TokenFunction, adjusted, token_values
from raytune_llm.records import Batch


class CausalLM(nn.Module):
    """Applies a function to the logits of the trained tokens, some thousand tokens at a time.

    Logits of other tokens are never computed, and those of all trained tokens never exist at once.

    It is the root that a strategy wraps, so that one call of it is one forward pass of everything it shards.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compute: torch.dtype = torch.float32,
        attention_backend: str = "varlen",
        chunk_tokens: int = 1024,
        compiled: bool = False,
        offloads: bool = False,
    ) -> None:
        """Matrix products and the residual stream are in `compute`, whatever the weights are kept in.

        offloads: activations wait in host memory for the backward pass.
        """
        super().__init__()
        self.model: Any = model
        self.compute = compute
        self.attention_backend = attention_backend
        self.chunk_tokens = chunk_tokens
        self.compiled = compiled
        self.offloads = offloads

    @property
    def base(self) -> Any:
        """The transformers model, with or without adapters in its layers."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    def forward(self, batch: Batch, token_function: TokenFunction) -> Tensor:
        with torch.autocast(batch.ids_BT.device.type, self.compute, enabled=self.compute != torch.float32):
            return self._forward(batch, token_function)

    def _hidden(self, batch: Batch) -> Tensor:
        """The last hidden states [B, T, D]."""
        base = self.base
        cu_seqlens_S, max_seqlen = attention.fixed(batch.cu_seqlens_S, batch.max_seqlen)
        prefixes = attention.fixed_prefixes(batch.prefixes)
        embedded_BTD = base.get_input_embeddings()(batch.ids_BT).to(self.compute)
        if torch.is_grad_enabled() and not embedded_BTD.requires_grad:
            embedded_BTD.requires_grad_()  # or the first layer, whose input alone needs no gradient, would be compiled by itself
        window = getattr(base.config.get_text_config(), "sliding_window", None)
        B, T = batch.ids_BT.shape
        masks = attention.block_masks(self.attention_backend, batch.cu_seqlens_S, B, T, window, batch.prefixes)
        with self._kept(embedded_BTD):
            return base.base_model(
                inputs_embeds=embedded_BTD,
                position_ids=batch.positions_BT,
                cu_seqlens_S=cu_seqlens_S,
                max_seqlen=max_seqlen,
                prefixes=prefixes,
                use_cache=False,
                **masks,
            ).last_hidden_state

    def _forward(self, batch: Batch, token_function: TokenFunction) -> Tensor:
        base = self.base
        hidden_ND = self._hidden(batch).flatten(0, 1).index_select(0, batch.trained_N)
        head, values = base.get_output_embeddings(), adjusted(token_function, *_logit_changes(base.config))
        if type(head) is nn.Linear and head.bias is None and head.weight.ndim == 2:
            return token_values(
                hidden_ND,
                head.weight,
                batch.targets_N,
                values,
                compute=self.compute,
                # A trained head keeps the same however it is cut, and each cut is a pass over its gradient.
                chunk_tokens=self.chunk_tokens * (8 if head.weight.requires_grad else 1),
                compiled=self.compiled,
            )
        return self._recomputed(hidden_ND, batch.targets_N, head, values)

    def _kept(self, embedded_BTD: Tensor) -> AbstractContextManager[Any]:
        """Where the layers' activations are kept. Boundaries and rotary tables, small and shared, stay on the device."""
        if not self.offloads or not torch.is_grad_enabled():
            return nullcontext()
        return HostMemory(min_bytes=embedded_BTD.numel() * embedded_BTD.element_size() // 4)()

    def _recomputed(self, hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, values: TokenFunction) -> Tensor:
        """For heads that are more than one matrix at hand (adapted, quantized, partitioned): chunks are computed again in the
        backward pass."""

        def of_chunk(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
            return values(head(hidden_ND), targets_N)

        chunks = list(zip(hidden_ND.split(self.chunk_tokens), targets_N.split(self.chunk_tokens), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([of_chunk(*chunk) for chunk in chunks])
        recompute = partial(checkpoint, use_reentrant=False)
        return torch.cat([recompute(of_chunk, *chunk) for chunk in chunks])


def _logit_changes(config: Any) -> tuple[float | None, float | None]:
    """What a few families do to the head's output: Granite divides, Cohere multiplies, Gemma caps."""
    divided = getattr(config, "logits_scaling", None)
    scale = 1 / divided if divided else getattr(config, "logit_scale", None)
    return scale, getattr(config, "final_logit_softcapping", None)
