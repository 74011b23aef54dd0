"""Adapters in PEFT's layers, under its names, with one adapter in use at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, Layered, SavedAdapter
from raytune_llm.errors import ConfigError, UserError, first_line
from raytune_llm.models.adapters.grouped import described, group
from raytune_llm.models.adapters.method import Method, new_config, tied_ends
from raytune_llm.models.adapters.methods import method_of, saved_method
from raytune_llm.models.adapters.protocol import OWN, Observer
from raytune_llm.models.adapters.saved import (
    PREFIX,
    WEIGHTS,
    changes_one_end,
    has_new_tokens,
    load_weights,
    names_of,
    read_config,
    token_ids_of,
    unfit,
)
from raytune_llm.models.multimodal import is_multimodal
from raytune_llm.models.quantization.base import Quantization
from raytune_llm.models.stored import of_type

SCORE_HEAD = ("score.weight",)


class PeftAdapters:
    """Implements `Adapters`."""

    def __init__(self, model: nn.Module, *, scores: bool = False) -> None:
        """model: a transformers model, or PEFT's around one. scores: it has a score head, and each adapter has its own."""
        self.model: nn.Module = model
        """The module to which parameters' names are relative."""
        self._peft: Any = model if isinstance(model, PeftModel) else None
        self._base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._scores = scores
        self._quantization: Quantization | None = None
        self._own: AdapterConfig | SavedAdapter | None = None
        self._begun: dict[str, dict[str, Tensor]] = {}
        """Our names -> initial values of adapters whose saved form needs them (PiSSA)."""
        self._keys: dict[str, str] = {key: key for key in self._peft.peft_config} if self._peft else {}
        """Our names -> PEFT's, which may not contain dots."""
        self._numbers = count()
        self._switches = _switches(model)

    @property
    def base(self) -> PreTrainedModel:
        return self._base

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._keys)

    @property
    def max_rank(self) -> int:
        layers = (module for module in self._base.modules() if isinstance(module, LoraLayer))
        return max((rank for layer in layers for rank in layer.r.values()), default=0)

    def described(self, device_type: str) -> str | None:
        configs = self._peft.peft_config.values() if self._peft else ()
        alone = [kind for kind, method in filter(None, map(saved_method, configs)) if method.kept.alone]
        return f"a layer at a time, as PEFT computes {alone[0]}" if alone else described(self._base, device_type)

    def add(self, name: str, source: AdapterConfig | SavedAdapter) -> None:
        with self._as_it_is():
            self._put(name, f"adapter{next(self._numbers)}", source)

    def add_own(
        self,
        source: AdapterConfig | SavedAdapter,
        new_ids: Sequence[int] = (),
        *,
        quantization: Quantization | None = None,
    ) -> None:
        """Add the policy's own adapter, which must be the first, and make it active and trained.

        new_ids: tokens whose embeddings belong to the adapter; the model's embeddings already have their rows. quantization: the
        one that will be applied to the weights of its layers."""
        self._quantization = quantization
        self._put(OWN, OWN, source, new_ids)
        self._own = source
        self.model = adapted = cast(PeftModel, self._peft)
        for switch in self._switches:
            switch.cast_input_dtype_enabled = False  # autocast casts inputs, so PEFT's copy in float32 would be wasted
        for parameter in names_of(adapted, OWN).values():
            parameter.requires_grad_(True)

    def quantized(self) -> None:
        for key in self._keys.values():
            if (known := saved_method(self._peft.peft_config[key])) is not None:
                known[1].quantized(self._base, key, new=self._own is not None and self._own.path is None)

    def merge(self, source: SavedAdapter) -> None:
        """Merge a saved adapter into the model's own weights. The model must have no other adapter.

        For a model on the meta device, this only checks that the adapter fits.
        """
        assert self._peft is None
        if token_ids_of(source.path, source.setting):
            raise has_new_tokens(source.path, source.setting)
        self._put(OWN, OWN, source)
        self._check_ends(source)
        if next(self._base.parameters()).is_meta:
            self._take_off(OWN)
            return
        cast(Any, self._peft).merge_and_unload()
        self._keys.pop(OWN)
        self._peft, self._switches = None, _switches(self._base)
        self._base.requires_grad_(True)  # as after loading, since PEFT has frozen it

    def _check_ends(self, source: SavedAdapter) -> None:
        """Raises ConfigError if the embedding and the head are tied and the adapter would change only one of them."""
        if self._base.get_output_embeddings() is None:
            return
        ends = tied_ends(self._base)
        changed = [switch for switch in self._switches if not isinstance(switch, TrainableTokensWrapper)]
        names = [name for name, module in self._base.named_modules() if name in ends and module in changed]
        if names:
            self._take_off(OWN)
            raise changes_one_end(f"{names[0]}.weight", source.path, source.setting)

    def remove(self, name: str) -> None:
        assert name != OWN, "the policy was built with it"
        with self._as_it_is():
            self._take_off(name)

    def save(
        self, name: str, folder: Path, *, base_model: str | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        config, weights = self._file(name, parameters)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS[0], metadata={"format": "pt"})
        config.inference_mode, config.base_model_name_or_path = True, base_model
        config.save_pretrained(str(folder))

    def saved_values(self, name: str) -> int:
        """The number of elements in the adapter's file."""
        return sum(value.numel() for value in self._file(name, None)[1].values())

    def trained(self, name: str) -> dict[str, nn.Parameter]:
        own = names_of(self._peft, self._keys[name])
        return {self._in_model(name): parameter for name, parameter in own.items() if parameter.requires_grad}

    def lr_factor(self, name: str) -> float:
        section = self._own
        return method_of(section).lr_factor(name, section) if isinstance(section, Layered) else 1.0

    def observer(self) -> Observer | None:
        section = self._own
        make = method_of(section).observer if isinstance(section, Layered) and section.path is None else None
        return None if make is None else make(self._base, self._keys[OWN])

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Unlike PEFT's set_adapter, this does not change requires_grad, which strategies have read already."""
        key = None if name is None else self._keys[name]
        with self._as_it_is():
            for switch in self._switches:
                switch._disable_adapters = key is None
                if key is not None:
                    switch._active_adapter = [key] if _has(switch, key) else []
            yield

    def by_documents(self, slot_M: Tensor, cu_seqlens_S: Tensor, num_tokens: int) -> Mapping[str, Any]:
        raise AssertionError("PEFT's layers compute one adapter a pass; a bank computes several")

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        """A context that restores the active adapter at its end; layers adapted within it then have none active."""
        before = {switch: (switch._active_adapter, switch._disable_adapters) for switch in self._switches}
        try:
            yield
        finally:
            for switch in self._switches:
                switch._active_adapter, switch._disable_adapters = before.get(switch, (switch._active_adapter, True))

    def _put(self, name: str, key: str, source: AdapterConfig | SavedAdapter, new_ids: Sequence[int] = ()) -> None:
        assert name not in self._keys, name
        config: Any = self._config(source)
        setting = source.setting if isinstance(source, SavedAdapter) else "adapter.path"
        self._take_tokens(config, new_ids, source.path, setting)
        base_model, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns if it differs
        # On a base without weights, the adapter has none either, since its initial values may depend on the base's.
        place = torch.device("meta") if next(self._base.parameters()).is_meta else nullcontext()
        named = getattr(config, "target_modules", None)
        try:
            with place:
                if self._peft is None:
                    self._peft = get_peft_model(self._base, config, key, autocast_adapter_dtype=True)
                else:
                    self._peft.add_adapter(key, config, autocast_adapter_dtype=True)
        except Exception as error:  # PEFT raises anything for a config that doesn't fit
            if source.path is None:
                raise
            raise unfit(first_line(error), str(source.path), setting, base_model) from error
        if is_multimodal(self._base.config) and named is not None:
            config.target_modules = named  # PEFT's shortened names would match layers of the vision towers too
        self._keys[name] = key
        if (known := saved_method(config)) is not None:
            known[1].placed(self._base, key)
        self._base.train(self._base.training)  # PEFT's new layers are in training mode
        self._switches = _switches(group(self._base))
        for parameter in names_of(self._peft, key).values():
            parameter.requires_grad_(False)
            parameter.data = of_type(parameter, torch.float32)  # PEFT does this for adapters, but not for a score head
        if source.path is None:
            self._begin(name, method_of(cast(Layered, source)))
        else:
            try:
                may_lack = SCORE_HEAD if self._scores else ()
                load_weights(self._peft, key, source.path, setting, may_lack=may_lack, base_model=base_model)
            except Exception as error:
                self._take_off(name)
                if isinstance(error, UserError):
                    raise
                raise unfit(first_line(error), source.path, setting, base_model) from error

    def _file(self, name: str, parameters: Mapping[str, Tensor] | None) -> tuple[PeftConfig, Mapping[str, Tensor]]:
        """The config and tensors of an adapter's file. parameters: values to save instead of the adapter's own."""
        key = self._keys[name]
        state = None if parameters is None else {self._in_peft(name): value for name, value in parameters.items()}
        # Embeddings are frozen here. PEFT would otherwise ask the hub whether the vocabulary was resized.
        weights = get_peft_model_state_dict(self._peft, state, key, save_embedding_layers=False)
        config = copy.copy(self._peft.peft_config[key])
        return (config, weights) if name not in self._begun else self._converted(name, config, weights)

    def _begin(self, name: str, method: Method) -> None:
        key = self._keys[name]
        method.begin(self._base, key, self._quantization)
        if method.saved is not None:
            tensors = get_peft_model_state_dict(self._peft, adapter_name=key, save_embedding_layers=False)
            self._begun[name] = {tensor: _host_copy(value) for tensor, value in tensors.items()}

    def _converted(self, name: str, config: PeftConfig, weights: Mapping[str, Tensor]) -> tuple[PeftConfig, Mapping[str, Tensor]]:
        assert name == OWN and self._own is not None
        convert = method_of(cast(Layered, self._own)).saved
        assert convert is not None
        return convert(config, weights, self._begun[name])

    def _take_off(self, name: str) -> None:
        key = self._keys.pop(name)
        self._begun.pop(name, None)
        if self._keys:
            for switch in self._switches:
                switch._active_adapter = [other for other in switch.active_adapters if other != key]
            self._peft.delete_adapter(key)
            # PEFT's active adapter must exist when another one is added; layers have their own active adapter.
            self._peft.active_adapter = self._peft.base_model.active_adapter = next(iter(self._keys.values()))
        else:
            self._peft.unload()  # PEFT's model can't have zero adapters
            self._peft = None
        self._switches = _switches(self._base)

    def _config(self, source: AdapterConfig | SavedAdapter) -> PeftConfig:
        """PEFT's config of a new or saved adapter. Raises ConfigError if it doesn't fit the model."""
        config = read_config(source.path, source.setting) if isinstance(source, SavedAdapter) else self._config_of(source)
        if isinstance(source, SavedAdapter) and not self._scores and not self._base.can_generate():
            config.task_type = None  # a language model's adapter, with which a reward model begins
        if self._scores:
            config.task_type = "SEQ_CLS"  # type: ignore[assignment]  # PEFT's enum is one of strings
        config.inference_mode = False  # otherwise a score head would have no parameters of its own
        return config

    def _take_tokens(self, config: Any, new_ids: Sequence[int], path: str | None, setting: str) -> None:
        """Make the embeddings of new tokens part of the adapter, and the head's rows if it is not tied to the embedding."""
        whole = [f".{name}" for name in getattr(config, "modules_to_save", None) or ()]  # trained with all their rows
        embeddings, head = self._base.get_input_embeddings(), self._base.get_output_embeddings()
        parts = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
        of_parts = [name for name, module in self._base.named_modules() if any(module is part for part in parts)]
        names = [name for name in of_parts if not f".{name}".endswith(tuple(whole))]
        saved = [] if path is None else token_ids_of(path, setting)
        if path is not None and names and saved != list(new_ids):
            rule = f"must hold the embeddings of the run's new tokens: {len(saved)} there, {len(new_ids)} here"
            fix = "Set model.new_tokens and model.resize_vocab as that adapter was trained with; served, it is alone."
            raise ConfigError(setting, rule, got=path, fix=fix)
        if path is None and new_ids and names:
            config.trainable_token_indices = {name: list(new_ids) for name in names}

    def _config_of(self, section: AdapterConfig) -> PeftConfig:
        assert isinstance(section, Layered)
        method, path = method_of(section), section.path
        if path is None:
            return new_config(self._base, section, method)[0]
        config = read_config(path, "adapter.path")
        if not method.describes(config):
            known = saved_method(config)
            kind = known[0] if known else config.peft_type
            rule = f"must hold an adapter of the kind that is trained, {section.option}, which is {kind} there"
            raise ConfigError("adapter.path", rule, got=path, fix=f"Set adapter={kind}, if there is one.")
        method.continues(config, section)
        config.task_type = "CAUSAL_LM"  # type: ignore[assignment]
        return config

    def _in_peft(self, name: str) -> str:
        return name if self.model is self._peft else PREFIX + name

    def _in_model(self, name: str) -> str:
        return name if self.model is self._peft else name.removeprefix(PREFIX)


def _has(switch: Any, key: str) -> bool:
    """Whether this PEFT layer has the adapter. An adapter without new tokens is not in the layers for tokens."""
    return not isinstance(switch, TrainableTokensLayer) or key in switch.trainable_tokens_delta


def _host_copy(value: Tensor) -> Tensor:
    return value.detach().float().to("meta" if value.is_meta else "cpu", copy=True)


def _switches(model: nn.Module) -> list[Any]:
    """PEFT's modules that have an active adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
