"""Weights that stay in their files until a worker reads its own rows, so that no process holds a whole model.

This works for models whose files have every weight under its own name, as transformers saves them. Otherwise (experts that are
joined when they are loaded, a new score head), rank 0 loads the model for all workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from raytune_llm import packaged
from raytune_llm.errors import ConfigError, first_line

Files = Mapping[str, str]
"""The file of each weight."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(nn.Parameter):
    """A weight that is still in its file. It has a shape and a dtype but takes no memory."""

    file: str
    key: str

    @classmethod
    def of(cls, weight: nn.Parameter, file: str, key: str) -> Self:
        """A replacement for a weight on the meta device."""
        made = cls(torch.empty((), dtype=weight.dtype).expand(weight.shape), requires_grad=weight.requires_grad)
        made.file, made.key = file, key
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.of(self, self.file, self.key)

    def read(self, device: torch.device) -> nn.Parameter:
        """The whole weight, on the device."""
        whole = self.rows(0, len(self)).to(device=device, dtype=self.dtype)
        return nn.Parameter(whole, requires_grad=self.requires_grad)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, in the file's type. The file is memory-mapped, so only these rows are read."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_slice(self.key)[start:stop]


def of_type(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype; if its values are still in a file, its placeholder with that dtype."""
    if isinstance(weight, Stored):
        return torch.empty((), dtype=dtype).expand(weight.shape)
    return weight.detach().to(dtype)


def bring(model: nn.Module, device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
    """Move a model to the device; weights in files are read to it. Tied weights stay tied. Returns old parameter -> new one."""
    read: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Stored):
                read.setdefault(weight, weight.read(device))
                module._parameters[name] = read[weight]
    model.to(device)
    return read


def files_of(model: PreTrainedModel, path: str, *, revision: str | None) -> Files | None:
    """The file and name of each weight of a model on the meta device, if all are in the files in the same form; else None."""
    widened = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
    has_saved_buffers = any(name in model.state_dict() for name, _ in model.named_buffers())
    if changes_as_loaded(model) or widened or has_saved_buffers:
        return None
    weights, files = dict(model.named_parameters()), tensor_files(path, revision)
    if not weights.keys() <= files.keys():
        return None
    for file in set(files.values()):
        with safe_open(file, framework="pt") as opened:
            held = set(opened.keys())
            for key in (key for key in weights if files[key] == file):
                if key not in held or opened.get_slice(key).get_shape() != list(weights[key].shape):
                    return None
    return {key: files[key] for key in weights}


def changes_as_loaded(model: PreTrainedModel) -> bool:
    """Whether the files hold other tensors than the model: experts that are joined, or weights that are dequantized, on
    loading."""
    converted = any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model))
    return converted or getattr(model.config, "quantization_config", None) is not None


def check_files(model: PreTrainedModel, path: str) -> None:
    """Raises ConfigError if a folder's safetensors can't be read, or have other shapes than the model on the meta device.

    Only the files' headers are read. Shapes are not compared for models whose weights are converted on loading.
    """
    folder = packaged.resolve(path)
    if not Path(folder).is_dir():
        return
    compared = {} if changes_as_loaded(model) else dict(model.named_parameters())
    with _readable(path):
        files = tensor_files(folder, None)
        if not files and not list(Path(folder).glob("*.bin")):
            raise an_adapter(path) if (Path(folder) / "adapter_config.json").is_file() else _without_weights(path)
        for file in set(files.values()):
            with safe_open(file, framework="pt") as opened:
                shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys() & compared.keys()}
            for name, shape in shapes.items():
                if shape != list(compared[name].shape):
                    raise other_shape(path, name, shape, list(compared[name].shape))


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turns any error from reading a damaged file into a ConfigError."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        rule = f"must hold weights that can be read ({first_line(error)})"
        raise ConfigError("model.path", rule, got=path, fix="Copy the whole folder again.") from None


def an_adapter(path: str) -> ConfigError:
    fix = f"Set adapter.path={path}, and model.path to the model that it is for."
    return ConfigError("model.path", "must be a model, but this folder holds an adapter", got=path, fix=fix)


def _without_weights(path: str) -> ConfigError:
    return ConfigError("model.path", "must be a folder with weights", got=path, fix="Copy the whole folder.")


def other_shape(path: str, name: str, stored: Sequence[int], expected: Sequence[int]) -> ConfigError:
    return ConfigError(
        "model.config",
        f"must keep the shapes of the weights at model.path: {name} is {list(stored)} there, {list(expected)} in the config",
        got=path,
        fix="Leave out what changes shapes, or set model.weights=random.",
    )


def tensor_files(path: str, revision: str | None) -> Files:
    """The file of each tensor in a model's safetensors; empty if it has none."""

    def find(name: str) -> str | None:
        return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)

    if (index := find(INDEX)) is not None:
        with _readable(path):
            whose = dict(json.loads(Path(index).read_text())["weight_map"])
        found: Any = get_checkpoint_shard_files(path, index, revision=revision)[0]
        by_name = {Path(file).name: file for file in found}
        return {key: by_name[name] for key, name in whose.items()}
    if (whole := find(WHOLE)) is not None:
        with _readable(path), safe_open(whole, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), whole)
    return {}


def model_in_files(
    auto: Any, config: PretrainedConfig, path: str, files: Files, *, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with its weights left in their files, for `dtype`. Its buffers are computed."""
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    stored = {weight: Stored.of(weight, files[key], key) for key, weight in model.named_parameters()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = stored[weight]
    if model.can_generate():
        with suppress(OSError):  # without a generation config of its own, transformers derives one from the model's config
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()
