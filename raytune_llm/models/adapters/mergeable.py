"""Merging an adapter into its base's weights layer by layer, so that only one layer of the base is in memory.

PEFT merges. For this, the layer is the only one of a model, under its own name, so that the adapter's config (targets,
rank_pattern, DoRA, OFT) applies to it as in the whole model. VeRA's random matrices, which all layers share, are made for the
sizes of all layers. Adapters on a mixture's experts are merged by merged_experts.py.
Of plain LoRA, PEFT tells the matrices and their scale, and low_rank.py adds them: PEFT makes four copies of a weight in float32.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from raytune_llm.errors import ConfigError, last_line
from raytune_llm.models.adapters.low_rank import LowRank
from raytune_llm.models.adapters.merged_experts import MergedExperts, layer_of
from raytune_llm.models.adapters.saved import PREFIX, WEIGHTS, read_config, token_ids_of
from raytune_llm.models.finite import all_finite

KEY = "default"
"""PEFT's name of an adapter that gets none."""
BASE = ".base_layer.weight"
TOKENS = ".token_adapter.trainable_tokens_delta"
OF_ADAPTERS = (".lora_", ".oft_", ".boft_", ".hada_", ".lokr_", ".vera_", ".ia3_", ".ln_tuning_", ".hra_")
"""The prefixes of the adapter's part of a tensor name, which follows the layer's name."""
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
"""Matrices shared by all layers of an adapter: the name in the file -> PEFT's name."""


class Mergeable:
    """The adapter in a folder. Errors name the setting that gave the folder."""

    def __init__(self, folder: str, setting: str) -> None:
        """Raises ConfigError if the folder has no adapter, or one that can't be merged."""
        self.folder, self.setting = folder, setting
        self._config: Any = read_config(folder, setting)
        if getattr(self._config, "lora_bias", None):
            raise ConfigError(setting, "must not have lora_bias, to be merged from files", got=folder)
        self._parameters: Sequence[str] = getattr(self._config, "target_parameters", None) or ()
        """The parameters of experts with an adapter (PEFT's target_parameters)."""
        self._file = str(Path(folder) / WEIGHTS[0])
        if not Path(self._file).is_file():
            raise ConfigError(setting, f"must be a folder with {WEIGHTS[0]}", got=folder, fix="Save it as safetensors.")
        self._keys: dict[str, list[str]] = defaultdict(list)
        self._shapes: dict[str, Sequence[int]] = {}
        """Layer -> [O, K], the shape of its weight in the base. Set by `fit`."""
        self._transposed: frozenset[str] = frozenset()
        """Layers of transformers' class Conv1D, whose weights are [K, O] in the base. Set by `fit`."""
        self._expert_keys: dict[str, str] = {}
        """Tensors of adapters on experts: the name in PEFT's model of the base -> the name in the file."""
        self._experts: MergedExperts | None = None
        """Set by `fit_experts`."""
        self._shared: dict[str, str] = {}
        self._bases: dict[str, str] = {}
        """Weights of base layers that PEFT saved with the adapter: embeddings, which may have more rows than the base's."""
        self.wholes: dict[str, str] = {}
        """Weights of modules_to_save: the name in the model -> the name in the file."""
        self.token_rows: dict[str, str] = {}
        """Embeddings and heads with trained rows for new tokens (model.new_tokens): the name in the model -> the name of the rows
        in the file."""
        try:
            with safe_open(self._file, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no dict)
                    self._sort(key)
        except SafetensorError as error:
            raise ConfigError(setting, f"must hold weights that can be read ({error})", got=folder) from None

    def _sort(self, key: str) -> None:
        if key in SHARED:
            self._shared[SHARED[key]] = key
            return
        name = key.removeprefix(PREFIX)
        layer = next((name.partition(part)[0] for part in OF_ADAPTERS if part in name), None)
        if name.endswith(TOKENS):
            self.token_rows[f"{name.removesuffix(TOKENS)}.weight"] = key
        elif layer is None and name.endswith(BASE):
            self._bases[name.removesuffix(BASE)] = key
        elif layer is None:
            self.wholes[name] = key
        elif self._is_of_experts(layer_of(layer)):
            self._expert_keys[name] = key
        else:
            self._keys[layer].append(key)

    def _is_of_experts(self, layer: str) -> bool:
        """Whether PEFT's target_parameters has a parameter of this module. Its entries are names or ends of names."""
        return any(f".{layer}".endswith(f".{name.rpartition('.')[0]}") for name in self._parameters)

    @property
    def has_experts(self) -> bool:
        """Whether the adapter is on a mixture's experts, for which `fit_experts` must be called."""
        return bool(self._expert_keys)

    @property
    def layers(self) -> frozenset[str]:
        """The names, in the model, of the layers that it changes."""
        return frozenset(self._keys)

    @property
    def changed_apart(self) -> frozenset[str]:
        """The weights that it changes in one layer only, which matters if two layers share the weight (tied embeddings)."""
        wholes = () if getattr(self._config, "ensure_weight_tying", False) else self.wholes
        return frozenset((*wholes, *(f"{layer}.weight" for layer in self._keys)))

    @property
    def of_conv1d(self) -> bool:
        """Whether it may be on layers of transformers' class Conv1D (GPT-2), whose weights are [K, O]."""
        return bool(getattr(self._config, "fan_in_fan_out", False))

    @property
    def scores(self) -> bool:
        """Whether it is a reward model's adapter."""
        return self._config.task_type == "SEQ_CLS"

    @property
    def base_model(self) -> str | None:
        return self._config.base_model_name_or_path

    @property
    def token_ids(self) -> list[int]:
        """The tokens whose embeddings belong to the adapter, in the order of its rows."""
        return token_ids_of(self.folder, self.setting)

    def with_tokens(self, name: str, weight_VD: Tensor) -> Tensor:
        """The embeddings or the head with the adapter's rows, float32 [V, D]. V grows if the adapter's tokens need more rows."""
        rows_ND = self._read([self.token_rows[name]])[self.token_rows[name]].float()
        ids_N = torch.tensor(self.token_ids)
        if rows_ND.shape != (len(ids_N), weight_VD.shape[1]):
            raise self._unfit(name, f"the rows of its {len(ids_N)} tokens are {list(rows_ND.shape)}")
        grown = weight_VD.float().new_zeros(max(len(weight_VD), int(ids_N.max()) + 1), weight_VD.shape[1])
        grown[: len(weight_VD)] = weight_VD
        return grown.index_copy(0, ids_N, rows_ND)

    def whole(self, name: str) -> Tensor:
        return self._read([self.wholes[name]])[self.wholes[name]]

    def fit(self, shapes: Mapping[str, Sequence[int]], transposed: frozenset[str] = frozenset()) -> None:
        """Set the base's shapes. shapes: layer -> [O, K] of its weight; [K, O] for those in `transposed`. Raises ConfigError if
        LoRA's matrices don't fit them, according to the file's header."""
        self._transposed = transposed
        shapes = {layer: shape[::-1] if layer in transposed else shape for layer, shape in shapes.items()}
        with safe_open(self._file, framework="pt") as file:
            for layer, keys in self._keys.items():
                for part, axis, what in ((".lora_A.", 1, "inputs"), (".lora_B.", 0, "outputs")):
                    for key in (key for key in keys if part in key):
                        if (size := file.get_slice(key).get_shape()[axis]) != shapes[layer][axis]:
                            raise self._unfit(layer, f"it has {size} {what} there and {shapes[layer][axis]} in the base")
        self._shapes = {layer: shapes[layer] for layer in self._keys}

    def fit_experts(self, model: PreTrainedModel, stored: Mapping[str, Sequence[int]]) -> None:
        """Find the experts in the base. model: the base, on the meta device. stored: the shapes of the tensors in its files.
        Raises ConfigError if the experts don't fit the adapter."""
        try:
            with safe_open(self._file, framework="pt") as file:
                own = {name: file.get_slice(key).get_shape() for name, key in self._expert_keys.items()}
            self._experts = MergedExperts(model, self._config, own, stored)
        except (LookupError, ValueError) as error:
            raise self._unfit("experts", last_line(error)) from None

    def _read_of_experts(self, name: str) -> Tensor:
        key = self._expert_keys[name]
        return self._read([key])[key]

    def changes(self, name: str) -> bool:
        """Whether it changes this weight or bias of the base, apart from modules_to_save. An adapter that multiplies a layer's
        outputs also multiplies its bias."""
        if self._experts is not None and name in self._experts.names:
            return True
        layer, _, part = name.rpartition(".")
        return layer in self._keys and (part == "weight" or (part == "bias" and isinstance(self._config, IA3Config)))

    @torch.no_grad()
    def merged(self, name: str, value: Tensor) -> Tensor:
        """The merged weight or bias of a layer, or the merged weight of experts, in float32."""
        if self._experts is not None and name in self._experts.names:
            return self._experts.merged(name, value, self._read_of_experts)
        layer, _, part = name.rpartition(".")
        turns = part == "weight" and layer in self._transposed
        adapted = self._adapted(layer, {part: (value.T if turns else value).to(torch.float32, copy=True)})
        merged = adapted.merge_and_unload().get_submodule(layer).get_parameter(part).data
        return merged.T.contiguous() if turns else merged

    def low_rank(self, name: str) -> LowRank | None:
        """What it adds to a weight that it changes; None where it does more than to add a product."""
        layer, _, part = name.rpartition(".")
        if part != "weight" or layer not in self._keys or layer in self._bases or not isinstance(self._config, LoraConfig):
            return None
        one: Any = self._adapted(layer, {}).get_submodule(f"{PREFIX}{layer}")
        if type(one) is not Linear or KEY in one.lora_variant:
            return None
        a_RK, b_OR = (half[KEY].get_parameter("weight").data.float() for half in (one.lora_A, one.lora_B))
        if layer in self._transposed:
            return LowRank(a_RK.T, one.scaling[KEY] * b_OR.T)
        return LowRank(one.scaling[KEY] * b_OR, a_RK)

    def _adapted(self, layer: str, own: Mapping[str, Tensor]) -> PeftModel:
        """PEFT's model of this layer alone, with the adapter on it. own: as `_alone` takes it."""
        tensors = self._read(self._keys[layer])
        shape = self._shapes[layer]
        if layer in self._bases and (saved := self._read([self._bases[layer]])[self._bases[layer]]).shape != tuple(shape):
            raise self._unfit(layer, f"it is {list(saved.shape)} there and {list(shape)} in the base")
        adapted = self._around(_alone(layer, shape, own, is_embedding=_embeds(tensors)), layer)
        for shared, whole in self._shared_by_layers.items():
            getattr(adapted.base_model, shared)[KEY] = whole
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Specified to not load vera_A")
                found = set_peft_model_state_dict(adapted, tensors)
        except (ValueError, RuntimeError, KeyError) as error:
            raise self._unfit(layer, last_line(error)) from None
        if found.unexpected_keys or any(not key.endswith((".weight", ".bias")) for key in found.missing_keys):
            raise self._unfit(layer, f"tensors don't fit ({[*found.unexpected_keys, *found.missing_keys][0]})")
        return adapted

    @cached_property
    def _shared_by_layers(self) -> Mapping[str, Tensor]:
        """The matrices that all layers share, by PEFT's names. PEFT draws them with the largest sizes among the layers."""
        if not isinstance(self._config, VeraConfig):
            return {}
        if self._shared:
            return {name: self._read([key])[key].float() for name, key in self._shared.items()}
        largest = [max(shape[axis] for shape in self._shapes.values()) for axis in (0, 1)]
        layer = next(iter(self._shapes))
        made = self._around(_alone(layer, largest, {}, is_embedding=False), layer).base_model
        return {name: getattr(made, name)[KEY] for name in SHARED.values()}

    def _around(self, one: nn.Module, layer: str) -> PeftModel:
        """PEFT's model with a new adapter around the model with one layer."""
        config = copy.deepcopy(self._config)
        config.task_type, config.modules_to_save, config.base_model_name_or_path = None, None, None
        config.trainable_token_indices = None
        if self.of_conv1d:
            config.fan_in_fan_out = False  # the layer alone is a linear one
        if self._parameters:
            config.target_parameters = None
        config.inference_mode, config.save_projection = False, False  # the projections are set by the caller
        try:
            adapted = get_peft_model(one, config, autocast_adapter_dtype=True)
        except (ValueError, RuntimeError, KeyError) as error:
            raise self._unfit(layer, last_line(error)) from None
        assert isinstance(adapted, PeftModel)
        return adapted

    @cached_property
    def _tensors(self) -> Any:
        """The file, which stays open: to open it is to read what it says of all its tensors."""
        return safe_open(self._file, framework="pt")

    def _read(self, keys: list[str]) -> dict[str, Tensor]:
        tensors = {key: self._tensors.get_tensor(key) for key in keys}
        if lost := [key for key, tensor in tensors.items() if tensor.is_floating_point() and not all_finite(tensor)]:
            rule = f"must have finite weights: {lost[0]} has NaN or infinite ones"
            raise ConfigError(self.setting, rule, got=self.folder, fix="Take an earlier checkpoint, or train it again.")
        return tensors

    def _unfit(self, layer: str, what: str) -> ConfigError:
        fix = f"It was trained on {self.base_model}." if self.base_model else ""
        return ConfigError(self.setting, f"must be an adapter of this model: {layer}: {what}", got=self.folder, fix=fix)


def _embeds(tensors: Mapping[str, Tensor]) -> bool:
    return any(".lora_embedding_" in key for key in tensors)


def _alone(name: str, shape_OK: Sequence[int], own: Mapping[str, Tensor], *, is_embedding: bool) -> nn.Module:
    """A model that has only this layer, under its name. own: its weight or its bias. A weight that is not given is 0, expanded
    from one element, so that it takes no memory."""
    rows, columns = shape_OK
    with torch.device("meta"):
        made = nn.Embedding(rows, columns) if is_embedding else nn.Linear(columns, rows, bias=False)
    for part, value in {"weight": torch.zeros(()).expand(rows, columns), **own}.items():
        setattr(made, part, nn.Parameter(value, requires_grad=False))
    *path, last = name.split(".")
    root = place = nn.Module()
    for part in path:
        place.add_module(part, nn.Module())
        place = place.get_submodule(part)
    place.add_module(last, made)
    return root
