"""A language model as the stages see it: what it says about the trained tokens of a batch, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.activations import HostMemory
from raytune_llm.models.adapters import Adapters, PeftAdapters
from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache
from raytune_llm.models.attention.documents import document_numbers
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
from raytune_llm.models.layers import named_layers
from raytune_llm.models.neftune import neftune_noise
from raytune_llm.records import Batch


class CausalLM(nn.Module):
    """Applies a function to the logits of the trained tokens, some thousand tokens at a time.

    Logits of other tokens are never computed, and those of all trained tokens never exist at once.

    It is the root that a strategy wraps, so that one call of it is one forward pass of everything it shards.
    """

    scores: ClassVar[bool] = False
    """It has a score head in place of the language model's."""

    def __init__(
        self,
        model: nn.Module,
        *,
        adapters: Adapters | None = None,
        compute: torch.dtype = torch.float32,
        attention_backend: str = "varlen",
        chunk_tokens: int = CHUNK_TOKENS,
        compiled: bool = False,
        offloads: bool = False,
    ) -> None:
        """Matrix products and the residual stream are in `compute`, whatever the weights are kept in.

        adapters: the model's, where they are not PEFT's. offloads: activations wait in host memory for the backward pass.
        """
        super().__init__()
        self.model: Any = model
        self.adapters: Adapters = adapters or PeftAdapters(model, scores=self.scores)
        self.compute = compute
        self.attention_backend = attention_backend
        self.chunk_tokens = chunk_tokens
        self.compiled = compiled
        self.offloads = offloads

    @property
    def base(self) -> Any:
        """The transformers model, with or without adapters in its layers."""
        return self.adapters.base

    def forward(
        self,
        batch: Batch,
        token_function: TokenFunction,
        *,
        neftune_alpha: float | None = None,
        beside_reference: bool = False,
        routers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, int]:
        """What token_function says of the trained tokens: [N], or [N, K] where it says several things.

        neftune_alpha: noise on the embeddings, in training. beside_reference: token_function takes, after the targets, the logits
        of the model without its adapter. routers: with the logits of every layer's router [layers, B * T, E], and how many
        experts a token goes to.
        """
        with torch.autocast(batch.ids_BT.device.type, self.compute, enabled=self.compute != torch.float32):
            other_ND = None
            if beside_reference:
                with torch.no_grad(), self.adapters.using(None):
                    other_ND = _trained(self._outputs(batch).last_hidden_state, batch)
            outputs = self._outputs(batch, neftune_alpha if self.training else None, output_router_logits=routers)
            values = self._values(_trained(outputs.last_hidden_state, batch), batch, token_function, other_ND)
        return (values, torch.stack(outputs.router_logits), self._experts_per_token()) if routers else values

    def hidden(self, inputs: Batch | CachedRows, route: Mapping[str, Any] | None = None) -> Tensor:
        """The last hidden states: [B, T, D] of a batch of packs, [1, L, D] of a step over a cache, which it fills.

        Both go through the same layers, with the adapters that are in use: what is served is what was trained. route: what a bank
        of several adapters has layers know of the pass; that of a batch by itself is its documents' (adapter_M).
        """
        ids = inputs.ids_1L if isinstance(inputs, CachedRows) else inputs.ids_BT
        with torch.autocast(ids.device.type, self.compute, enabled=self.compute != torch.float32):
            if not isinstance(inputs, CachedRows):
                return self._outputs(inputs, route=route).last_hidden_state
            embedded_1LD = self.base.get_input_embeddings()(ids).to(self.compute)
            return self.base.base_model(
                inputs_embeds=embedded_1LD,
                position_ids=inputs.positions_1L,
                cached_rows=inputs,
                use_cache=False,
                **(route or {}),
            ).last_hidden_state

    def cache_bytes_a_token(self) -> int:
        """Of a PagedCache of all layers, found by computing one token."""
        device = self.base.get_input_embeddings().weight.device
        cache = PagedCache(1, 1, dtype=self.compute, device=device)
        with torch.no_grad():
            self.hidden(CachedRows.of(cache, [NewTokens([0], 0, [0])]))
        return cache.bytes_a_token

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V]: of the token after each of these."""
        with torch.autocast(hidden_ND.device.type, self.compute, enabled=self.compute != torch.float32):
            logits_NV = self.base.get_output_embeddings()(hidden_ND).float()
        return changed(logits_NV, *_logit_changes(self.base.config))

    def _outputs(
        self,
        batch: Batch,
        neftune_alpha: float | None = None,
        *,
        output_router_logits: bool = False,
        route: Mapping[str, Any] | None = None,
    ) -> Any:
        """What the transformers model gives."""
        base = self.base
        if output_router_logits:
            self._has_routers()
        cu_seqlens_S, max_seqlen = attention.fixed(batch.cu_seqlens_S, batch.max_seqlen)
        prefixes = attention.fixed_prefixes(batch.prefixes)
        embedded_BTD = base.get_input_embeddings()(batch.ids_BT)
        if neftune_alpha is not None:
            embedded_BTD = embedded_BTD + self._noise(batch, embedded_BTD.shape[-1], neftune_alpha)
        embedded_BTD = embedded_BTD.to(self.compute)
        if self.compiled and torch.is_grad_enabled() and self._trains_first_layer() and not embedded_BTD.requires_grad:
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
                **(self._route(batch) if route is None else route),
                **({"output_router_logits": True} if output_router_logits else {}),
            )

    def _route(self, batch: Batch) -> Mapping[str, Any]:
        """Which adapter each document goes to, where there are several."""
        if batch.adapter_M is None:
            return {}
        return self.adapters.by_documents(batch.adapter_M, batch.cu_seqlens_S, batch.ids_BT.numel())

    def _trains_first_layer(self) -> bool:
        """Where it does not, the backward pass ends at the first one that does."""
        first = next((layer for _, layer in named_layers(self.base)), None)
        return first is not None and any(parameter.requires_grad for parameter in first.parameters())

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

    def _noise(self, batch: Batch, width: int, alpha: float) -> Tensor:
        B, T = batch.ids_BT.shape
        document_L = document_numbers(batch.cu_seqlens_S, B, T).flatten() - 1
        ids_L, positions_L = batch.ids_BT.flatten(), batch.positions_BT.flatten()
        return neftune_noise(ids_L, positions_L, document_L, width=width, alpha=alpha, seed=batch.seed).view(B, T, width)

    def _has_routers(self) -> None:
        setting = "stage.router_aux_loss_coef"
        if "router_logits" not in self.base.base_model.can_record_outputs:
            model_type = self.base.config.model_type
            raise ConfigError(setting, f"must be null for {model_type}, which has no routers", fix="Leave it out.")

    def _experts_per_token(self) -> int:
        return self.base.config.get_text_config().num_experts_per_tok

    def _kept(self, embedded_BTD: Tensor) -> AbstractContextManager[Any]:
        """Where the layers' activations are kept. Boundaries and rotary tables, small and shared, stay on the device."""
        if not self.offloads or not torch.is_grad_enabled():
            return nullcontext()
        return HostMemory(min_bytes=embedded_BTD.numel() * embedded_BTD.element_size() // 4)()

    def _recomputed(
        self, hidden_ND: Tensor, targets_N: Tensor, other_ND: Tensor | None, head: nn.Module, values: TokenFunction
    ) -> Tensor:
        """For heads that are more than one matrix at hand (adapted, quantized, partitioned): chunks are computed again in the
        backward pass. What goes back through the head then is autograd's own, outside of its range in traces."""

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
    """What a few families do to the head's output: Granite divides, Cohere multiplies, Gemma caps."""
    divided = getattr(config, "logits_scaling", None)
    scale = 1 / divided if divided else getattr(config, "logit_scale", None)
    return scale, getattr(config, "final_logit_softcapping", None)
