"""A policy: a model with its quantization, adapters and attention, used by trainer, evaluator, engine and server.

There is one path through its layers, for packs in training and for steps over a cache in decoding, so that a served or evaluated
model computes what was trained. Subclasses use the last hidden states: for values of trained tokens and next-token logits
(causal_lm.py), or for scores of documents (scorer.py).
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import BaseModelOutput

from raytune_llm.errors import ConfigError
from raytune_llm.models import attention
from raytune_llm.models.activations import HostMemory
from raytune_llm.models.adapters import OWN, Adapters, PeftAdapters
from raytune_llm.models.attention.cache import CachedRows, NewTokens, PagedCache
from raytune_llm.models.attention.decode_step import DecodeStep
from raytune_llm.models.attention.documents import document_numbers
from raytune_llm.models.config_file import MODEL_CONFIG, change_config
from raytune_llm.models.frozen_start import FrozenStart
from raytune_llm.models.layer_graphs import LayerGraphs
from raytune_llm.models.layers import named_layers
from raytune_llm.models.multimodal import text_model
from raytune_llm.models.neftune import neftune_noise
from raytune_llm.models.per_layer_inputs import looks_up, per_layer_inputs
from raytune_llm.records import Batch

Inputs = Batch | CachedRows | DecodeStep


class Policy(nn.Module):
    """The root module that a strategy wraps. One call is one forward pass of everything that the strategy shards."""

    scores: ClassVar[bool] = False
    """It has a score head instead of a language model head."""

    def __init__(
        self,
        model: nn.Module,
        *,
        adapters: Adapters | None = None,
        compute: torch.dtype = torch.float32,
        attention_backend: str = "varlen",
        in_lines: bool = False,
        compiled: bool = False,
        offloads: bool = False,
        cuda_graphs: bool = False,
        has_new_adapter: bool = False,
        has_changed_config: bool = False,
        base_vocabulary: int | None = None,
        shift_attn_tokens: int | None = None,
        left_out: Callable[[], Mapping[str, Tensor]] = dict,
        files_beside: Callable[[], Sequence[Path]] = tuple,
    ) -> None:
        """Matrix products and the residual stream are in `compute`, regardless of the dtype of the weights.

        in_lines: each document has its own row of the batch, and transformers' own layers compute it. adapters: the model's
        adapters, if they are not PEFT's. offloads: keep activations in host memory until the backward pass. cuda_graphs: capture
        the layers' passes in training, except for batches with shared prompts. has_new_adapter: without its adapter, the policy
        is the model that the run started from. has_changed_config: the config differs from the base's config.json.
        base_vocabulary: number of rows of the base's embeddings; an adapter may have more. shift_attn_tokens: tokens of a group
        of S2 attention, in training. left_out: gives weights of the base that are not part of this model (towers for other media,
        layers for multi-token prediction), in the types in which a whole model is saved with them. files_beside: gives files of
        the base that are saved with a whole model, such as those of an image processor.
        """
        super().__init__()
        self.model: Any = model
        self.adapters: Adapters = adapters or PeftAdapters(model, scores=self.scores)
        self.compute = compute
        self.attention_backend = attention_backend
        self._in_lines = in_lines
        self.compiled = compiled
        self.offloads = offloads
        self._graphs = LayerGraphs(self._last_hidden, self._trained) if cuda_graphs else None
        self._has_new_adapter, self._has_changed_config = has_new_adapter, has_changed_config
        self._base_vocabulary, self._left_out, self._files_beside = base_vocabulary, left_out, files_beside
        self._shift_attn_tokens = shift_attn_tokens
        self.frozen_start: FrozenStart | None = None
        """The frozen layers at the start, if build_policy has set that they are computed once for each batch."""
        self._as_found: list[Tensor] | None = None
        """The initial values of the trained parameters, in their order."""

    @property
    def base(self) -> Any:
        """The transformers model, with or without adapters in its layers."""
        return self.adapters.base

    # Through the layers ----------------------------------------------------------------------------------------------------

    def hidden(self, inputs: Inputs, route: Mapping[str, Any] | None = None, *, holds_route: bool = False) -> Tensor:
        """The last hidden states: [B, T, D] for a batch of packs, [1, L, D] for a step over a cache, which it fills.

        The adapter in use is applied. route: arguments for a bank of several adapters; by default, they follow from the batch's
        adapter_M. holds_route: the route is one object for many passes, which CUDA graphs may hold.
        """
        return self.outputs(inputs, route=route, holds_route=holds_route).last_hidden_state

    def outputs(
        self,
        inputs: Inputs,
        *,
        route: Mapping[str, Any] | None = None,
        holds_route: bool = False,
        neftune_alpha: float | None = None,
        router_logits: bool = False,
    ) -> Any:
        """The output of the transformers model: `last_hidden_state` and, on request, `router_logits` [B * T, E] of each layer.
        neftune_alpha: add noise to the embeddings of a batch."""
        if router_logits:
            self._check_routers()
        with self.autocast(inputs.ids_BT.device):
            embedded_BTD = self._embedded(inputs, neftune_alpha)
            if self._graphs is not None and not router_logits and self._replays(inputs) and (holds_route or route is None):
                hidden_BTD = self._graphs(embedded_BTD, inputs, route)
                return BaseModelOutput(last_hidden_state=hidden_BTD)  # type: ignore[arg-type]
            plain = neftune_alpha is None and not router_logits
            with self._kept(embedded_BTD), self._start(inputs) if plain else nullcontext():
                return self._through_layers(embedded_BTD, inputs, route, router_logits=router_logits)

    def _through_layers(
        self, embedded_BTD: Tensor, inputs: Inputs, route: Mapping[str, Any] | None, *, router_logits: bool = False
    ) -> Any:
        text, beside = text_model(self.base), {"output_router_logits": True} if router_logits else {}
        beside |= per_layer_inputs(text, inputs.ids_BT)
        return text(inputs_embeds=embedded_BTD, use_cache=False, **self._layer_arguments(inputs, route), **beside)

    def _start(self, inputs: Inputs) -> AbstractContextManager[None]:
        start = self.frozen_start
        return nullcontext() if start is None or not isinstance(inputs, Batch) else start.once(inputs, training=self.training)

    def _last_hidden(self, embedded_BTD: Tensor, batch: Batch, route: Mapping[str, Any] | None) -> Tensor:
        return self._through_layers(embedded_BTD, batch, route).last_hidden_state

    def _replays(self, inputs: Inputs) -> TypeGuard[Batch]:
        """Whether the pass is captured as a CUDA graph: a training pass over packs, with the adapter in use."""
        of_packs = isinstance(inputs, Batch) and inputs.adapter_M is None and inputs.prefixes is None
        return of_packs and self.training and torch.is_grad_enabled() and not looks_up(text_model(self.base))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which matrix products are in `compute`."""
        return torch.autocast(device.type, self.compute, enabled=self.compute != torch.float32)

    def cache_bytes_a_token(self) -> int:
        """Bytes per token of a PagedCache of all layers, measured by computing one token."""
        cache = PagedCache(1, 1, dtype=self.compute, device=self.base.get_input_embeddings().weight.device)
        with torch.no_grad():
            self.hidden(CachedRows.of(cache, [NewTokens([0], 0, [0])]))
        return cache.bytes_a_token

    def _embedded(self, inputs: Inputs, neftune_alpha: float | None) -> Tensor:
        embedded_BTD = self.base.get_input_embeddings()(inputs.ids_BT)
        if neftune_alpha is not None:
            assert isinstance(inputs, Batch), "noise is for training"
            embedded_BTD = embedded_BTD + self._noise(inputs, embedded_BTD.shape[-1], neftune_alpha)
        embedded_BTD = embedded_BTD.to(self.compute)
        if self.compiled and torch.is_grad_enabled() and self._trains_first_layer() and not embedded_BTD.requires_grad:
            embedded_BTD.requires_grad_()  # otherwise the first layer would be compiled separately, for an input without gradient
        return embedded_BTD

    def _noise(self, batch: Batch, width: int, alpha: float) -> Tensor:
        B, T = batch.ids_BT.shape
        document_L = document_numbers(batch.cu_seqlens_S, B, T).flatten() - 1
        ids_L, positions_L = batch.ids_BT.flatten(), batch.positions_BT.flatten()
        return neftune_noise(ids_L, positions_L, document_L, width=width, alpha=alpha, seed=batch.seed).view(B, T, width)

    def _trains_first_layer(self) -> bool:
        """Whether the first layer has trained parameters. If not, the backward pass ends at the first one that does."""
        first = next((layer for _, layer in named_layers(self.base)), None)
        return first is not None and any(parameter.requires_grad for parameter in first.parameters())

    def _layer_arguments(self, inputs: Inputs, route: Mapping[str, Any] | None) -> dict[str, Any]:
        """The layers' arguments besides hidden states: positions, arguments of attention, and the route for several adapters."""
        if self._in_lines:
            assert isinstance(inputs, Batch), "check_cached refuses such a model"
            return self._of_lines(inputs)
        beside: dict[str, Any] = {"position_ids": inputs.positions_BT}
        if not isinstance(inputs, Batch):
            return {**beside, "cached_rows": inputs, **(route or {})}
        if route is None and inputs.adapter_M is not None:
            route = self.adapters.by_documents(inputs.adapter_M, inputs.cu_seqlens_S, inputs.ids_BT.numel())
        window = getattr(self.base.config.get_text_config(), "sliding_window", None)
        groups = self._shift_attn_tokens if self.training else None
        return {**beside, **attention.arguments(self.attention_backend, inputs, window, groups), **(route or {})}

    def _of_lines(self, batch: Batch) -> dict[str, Any]:
        """The arguments for a batch with one document per row: positions, if the model takes them. Padding comes after the
        document."""
        takes_positions = "position_ids" in inspect.signature(cast(Any, text_model(self.base)).forward).parameters
        return {"position_ids": batch.positions_BT} if takes_positions else {}

    def _check_routers(self) -> None:
        setting = "stage.router_aux_loss_coef"
        if "router_logits" not in cast(Any, text_model(self.base)).can_record_outputs:
            model_type = self.base.config.model_type
            raise ConfigError(setting, f"must be null for {model_type}, which has no routers", fix="Leave it out.")

    def _kept(self, embedded_BTD: Tensor) -> AbstractContextManager[Any]:
        """A context that decides where activations are kept. Small tensors, such as boundaries and rotary tables, stay on the
        device."""
        if not self.offloads or not torch.is_grad_enabled():
            return nullcontext()
        return HostMemory(min_bytes=embedded_BTD.numel() * embedded_BTD.element_size() // 4)()

    # What the run found ----------------------------------------------------------------------------------------------------

    def keep_as_found(self) -> None:
        """Copy the trained parameters. It is called before the first step and before a checkpoint is restored. Nothing is copied
        if disabling a new adapter gives the same model."""
        if not self._has_new_adapter:
            self._as_found = [parameter.detach().clone() for parameter in self._trained()]

    def reference(self) -> AbstractContextManager[None]:
        """A context in which the policy is the same as at the start of the run: with a new adapter disabled (its output is zero
        before the first step), or with the trained parameters of keep_as_found."""
        if self._has_new_adapter:
            return self.adapters.using(None)
        return nullcontext() if self._as_found is None else self._with_values(self._as_found)

    @contextmanager
    def _with_values(self, values: Sequence[Tensor]) -> Iterator[None]:
        parameters = [parameter.detach() for parameter in self._trained()]
        now = [parameter.clone() for parameter in parameters]
        units = [unit for unit in self.modules() if isinstance(unit, FSDPModule)]

        @torch.no_grad()
        def become(values: Sequence[Tensor]) -> None:
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            for unit in units:
                unit.reshard()  # gathered weights are outdated when the shards change

        become(values)
        try:
            yield
        finally:
            become(now)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    # Saved -----------------------------------------------------------------------------------------------------------------

    def save(
        self,
        folder: Path,
        *,
        parameters: Mapping[str, Tensor],
        tokenizer: Any,
        stop_ids: Sequence[int],
        base_model: str | None = None,
        adapter: str = OWN,
    ) -> None:
        """Save everything that loading needs: an adapter for PEFT or a model for transformers, in `compute`, with a changed
        config, the tokens that end answers, tokenizer and chat template.

        parameters: the unsharded parameters of the adapter, or of the whole model, by their names here; the policy's own may be
        sharded. base_model: the path or hub id of the model that the adapter is for. adapter: its name, if there are several.
        """
        own = {name.removeprefix("model."): value for name, value in parameters.items()}
        if self.adapters.names:
            self.adapters.save(adapter, folder, base_model=base_model, parameters=own)
            if self._has_changed_config:
                self._config_of_base().save_pretrained(folder)
        else:
            weights = {name: value.to(self.compute) for name, value in own.items()}
            self._save_weights(folder, {**self._left_out(), **weights, **dict(saved_buffers(self.base))})
            for file in self._files_beside():
                shutil.copyfile(file, folder / file.name)
        change_config(folder / MODEL_CONFIG, self._with_saved_dtype)
        self._complete(folder, tokenizer, stop_ids)
        tokenizer.save_pretrained(folder)

    def _with_saved_dtype(self, config: dict[str, Any]) -> dict[str, Any]:
        """The values of config.json with the dtype of the saved weights: they are trained in float32 and saved in `compute`."""
        kept = {name: value for name, value in config.items() if name != "_attn_implementation"}
        return {**kept, "dtype": str(self.compute).removeprefix("torch.")}

    def _config_of_base(self) -> Any:
        """The config of the base. New tokens are the adapter's, so they are not counted in it."""
        config = copy.deepcopy(self.base.config)
        if self._base_vocabulary is not None:
            config.get_text_config().vocab_size = self._base_vocabulary
        return config

    def _complete(self, folder: Path, tokenizer: Any, stop_ids: Sequence[int]) -> None:
        """Add files that the head needs besides the weights. The tokenizer is saved afterwards."""

    def _save_weights(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self.base.save_pretrained(folder, state_dict=weights)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a model's weights but are not trained, such as DeepSeek V3's router biases."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer.detach().cpu()
