"""A language model for stages (values of a batch's trained tokens) and engines (logits of the next token)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from raytune_llm.models.generation_config import ending_at
from raytune_llm.models.head import (
    CHUNK_TOKENS,
    RANGE,
    TRAINED_CHUNKS,
    TokenFunction,
    adjusted,
    changed,
    chunks,
    together,
    token_values,
)
from raytune_llm.models.policy import Policy
from raytune_llm.records import Batch


class CausalLM(Policy):
    """Applies a function to the logits of the trained tokens, about a thousand tokens at a time.

    Logits of other tokens are never computed, and the logits of all trained tokens never exist at the same time.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS, **settings: Any) -> None:
        """settings: arguments of Policy."""
        super().__init__(model, **settings)
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        batch: Batch,
        token_function: TokenFunction,
        *,
        neftune_alpha: float | None = None,
        beside_reference: bool = False,
        routers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, int]:
        """token_function of the trained tokens: [N], or [N, K] if it returns several values.

        neftune_alpha: noise on the embeddings, in training. beside_reference: token_function also takes the logits of the model
        without its adapter, after the targets. routers: also return the router logits of all layers [layers, B * T, E] and the
        number of experts that a token goes to.
        """
        with self.autocast(batch.ids_BT.device):
            other_ND = None
            if beside_reference:
                with torch.no_grad(), self.adapters.using(None):
                    other_ND = _trained(self.hidden(batch), batch)
            noise = neftune_alpha if self.training else None
            outputs = self.outputs(batch, neftune_alpha=noise, router_logits=routers)
            values = self._values(_trained(outputs.last_hidden_state, batch), batch, token_function, other_ND)
        return (values, torch.stack(outputs.router_logits), self._experts_per_token()) if routers else values

    def values(self, hidden_BTD: Tensor, batch: Batch, token_function: TokenFunction, other_BTD: Tensor | None = None) -> Tensor:
        """The result of `forward` for given last hidden states. other_BTD: the reference's hidden states, if token_function needs
        them."""
        with self.autocast(hidden_BTD.device):
            other_ND = None if other_BTD is None else _trained(other_BTD, batch)
            return self._values(_trained(hidden_BTD, batch), batch, token_function, other_ND)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]: the logits of the next token at each position."""
        with self.autocast(hidden_ND.device):
            logits_NV = self.base.get_output_embeddings()(hidden_ND).float()
        return changed(logits_NV, *_logit_changes(self.base.config))

    def _complete(self, folder: Path, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        ending_at(self.base.generation_config, stop_ids).save_pretrained(folder)

    def _values(self, hidden_ND: Tensor, batch: Batch, token_function: TokenFunction, other_ND: Tensor | None) -> Tensor:
        base = self.base
        head, values = base.get_output_embeddings(), adjusted(token_function, *_logit_changes(base.config))
        if type(head) is nn.Linear and head.bias is None and head.weight.ndim == 2:
            return token_values(
                hidden_ND,
                head.weight,
                batch.targets_N,
                values,
                compute=self.compute,
                chunk_tokens=self.chunk_tokens * (TRAINED_CHUNKS if head.weight.requires_grad else 1),
                compiled=self.compiled,
                other_ND=other_ND,
            )
        return self._recomputed(hidden_ND, batch.targets_N, other_ND, head, values)

    def _experts_per_token(self) -> int:
        return self.base.config.get_text_config().num_experts_per_tok

    def _recomputed(
        self, hidden_ND: Tensor, targets_N: Tensor, other_ND: Tensor | None, head: nn.Module, values: TokenFunction
    ) -> Tensor:
        """The values for a head that is not a single matrix on this worker (adapted, quantized or partitioned). Chunks are
        computed again in the backward pass. Autograd computes the head's backward pass, which traces show outside RANGE."""

        @record_function(RANGE)
        def of_chunk(hidden_ND: Tensor, targets_N: Tensor, *others_ND: Tensor) -> Tensor:
            with torch.no_grad(), self.adapters.using(None) if others_ND else nullcontext():
                others_NV = [head(other_ND) for other_ND in others_ND]
            return together(values(head(hidden_ND), targets_N, *others_NV))

        parts = list(chunks(self.chunk_tokens, hidden_ND, targets_N, other_ND))
        if len(parts) == 1 or not torch.is_grad_enabled():
            return torch.cat([of_chunk(*part) for part in parts])
        recompute = partial(checkpoint, use_reentrant=False)
        return torch.cat([recompute(of_chunk, *part) for part in parts])


def _trained(hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """[N, D]"""
    return hidden_BTD.flatten(0, 1).index_select(0, batch.trained_N)


def _logit_changes(config: Any) -> tuple[float | None, float | None]:
    """(scale, softcap) of the logits, which a few families have: Granite divides, Cohere and Falcon-H1 multiply, Gemma and
    RecurrentGemma cap. In multimodal models, transformers does not multiply (Aya Vision), and caps by the text config (Gemma
    4)."""
    divided = getattr(config, "logits_scaling", None)
    multiplied = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return 1 / divided if divided else multiplied, cap
