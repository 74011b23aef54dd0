"""What is exported: a base in its files, and the adapters that are merged into it as its tensors are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig

from raytune_llm import packaged
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.run import ExportRun, TrainRun
from raytune_llm.errors import ConfigError
from raytune_llm.export.tensors import TensorFact, TensorFiles
from raytune_llm.models.adapters.merge import Mergeable
from raytune_llm.models.load import load_config
from raytune_llm.models.stored import tensor_files
from raytune_llm.runs.trained import read_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE, HEAD = "score.weight", "lm_head.weight"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
NOT_COPIED = ("README.md", "adapter_config.json", "LICENSE", ".gitattributes", "training_args.json")
NOT_FOR_MODELS = ("config.json", *NOT_COPIED)


@dataclass(frozen=True)
class Source:
    model: ModelConfig
    folder: Path
    """Of the base."""
    stored: TensorFiles
    """The base's tensors."""
    adapters: Sequence[tuple[Mergeable, float]]
    """Each with its weight."""
    beside: Path | None
    """The final/ of a run: its tokenizer, its generation config, and its config where the run changed that."""
    run: TrainRun | None

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """Of the base's tensors."""
        return self.stored.facts

    @property
    def scores(self) -> bool:
        """A reward model: with a score head in place of the language model's."""
        return SCORE in self.facts or any(adapter.scores for adapter, _ in self.adapters)

    @cached_property
    def config(self) -> PretrainedConfig:
        folder = self.beside if self.beside is not None and (self.beside / "config.json").is_file() else self.folder
        return load_config(str(folder), {}, trust_remote_code=self.model.trust_remote_code)

    @cached_property
    def wholes(self) -> dict[str, Mergeable]:
        """Tensors that an adapter has whole, by name."""
        found: dict[str, Mergeable] = {}
        for adapter, _ in self.adapters:
            for name in adapter.wholes:
                if name in found:
                    rule = f"can't be merged: {name} is whole in two of them, {found[name].folder} and {adapter.folder}"
                    raise ConfigError("export.adapters", rule)
                found[name] = adapter
        return found

    def outputs(self, dtype: torch.dtype | None) -> list[TensorFact]:
        """What the merged model's tensors are. None: each has its dtype in the base."""
        facts = [fact for name, fact in self.facts.items() if not (self.scores and name == HEAD)]
        common = next((fact.dtype for fact in facts if fact.dtype.is_floating_point), torch.float32)
        for name in self.wholes.keys() - self.facts.keys():
            facts.append(TensorFact(name, tuple(self.wholes[name].whole(name).shape), common))
        return [replace(fact, dtype=dtype) if dtype is not None and fact.dtype.is_floating_point else fact for fact in facts]

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """With all adapters in it. Raises ConfigError where the dtype can't hold it."""
        merged = self._merged(name)
        tensor = merged.to(dtype)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all() and torch.isfinite(merged).all():
            raise ConfigError(
                "export.dtype", f"can't hold {name}, whose values are too large", got=dtype, fix="Set bf16 or fp32."
            )
        return tensor

    def _merged(self, name: str) -> Tensor:
        if name in self.wholes:
            return self.wholes[name].whole(name)
        weight = self.stored.read(name)
        layer = name.removesuffix(".weight")
        own = [(adapter, factor) for adapter, factor in self.adapters if layer in adapter.layers and name.endswith(".weight")]
        if not own:
            return weight
        if len(own) == 1 and own[0][1] == 1.0:
            return own[0][0].merged(layer, weight)
        wide = weight.float()
        return wide + sum(factor * (adapter.merged(layer, weight) - wide) for adapter, factor in own)

    def copy_others(self, folder: Path) -> None:
        """Tokenizer, generation config, code: all but weights and config."""
        for place in filter(None, (self.folder, self.beside)):
            for file in sorted(place.iterdir()):
                if file.is_file() and file.name not in NOT_FOR_MODELS and not file.name.endswith(WEIGHT_SUFFIXES):
                    shutil.copyfile(file, folder / file.name)

    def config_json(self, dtype: torch.dtype | None) -> dict[str, Any]:
        folder = self.beside if self.beside is not None and (self.beside / "config.json").is_file() else self.folder
        values = json.loads((folder / "config.json").read_text())
        if dtype is not None:
            values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
        if self.scores:
            known: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
            values |= {
                "architectures": [known[type(self.config)].__name__],
                "id2label": {"0": "LABEL_0"},
                "label2id": {"LABEL_0": 0},
            }
            if values.get("pad_token_id") is None and (padding := self._padding()) is not None:
                values["pad_token_id"] = padding
        return values

    def _padding(self) -> int | None:
        from raytune_llm.data.tokens.tokenizer import load_tokenizer

        tokenizer: Any = load_tokenizer(str(self.beside or self.folder), needs_chat_template=False)
        return tokenizer.pad_token_id


def source_of(run: ExportRun) -> Source:
    """Raises ConfigError for all that can't be exported."""
    export = run.export
    model, beside, trained_run = run.model, None, None
    named = {name: (folder, f"export.adapters.{name}") for name, folder in export.adapters.items()}
    if export.run is not None:
        trained = read_trained(export.run, "export.run")
        model, trained_run, beside = trained.model, trained.run, trained.final
        if trained.adapter is not None:
            named = {trained.name: (str(trained.adapter), "export.run"), **named}
    if unknown := sorted(export.weights.keys() - named.keys()):
        raise ConfigError("export.weights", f"must have names of adapters ({', '.join(named) or 'none is given'})", got=unknown)
    adapters = [(Mergeable(*where), export.weights.get(name, 1.0)) for name, where in named.items()]
    assert model.path is not None or trained_run is not None
    if model.path is None:
        rule = "must be a run whose base has a path: an adapter of random weights can't be merged"
        raise ConfigError("export.run", rule, got=export.run)
    folder = Path(packaged.resolve(model.path))
    if not folder.is_dir():
        folder = Path(snapshot_download(model.path, revision=model.revision))
    if beside is None and len(adapters) == 1 and (Path(adapters[0][0].folder) / "tokenizer_config.json").is_file():
        beside = Path(adapters[0][0].folder)
    files = tensor_files(str(folder), None)
    if not files:
        fix = "Save the model with transformers first."
        raise ConfigError("model.path", "must have its weights as safetensors", got=str(folder), fix=fix)
    source = Source(model, folder, TensorFiles(files), adapters, None if beside == folder else beside, trained_run)
    _check(source)
    return source


def _check(source: Source) -> None:
    if getattr(source.config, "quantization_config", None) is not None and source.adapters:
        rule = "must not be quantized, to have adapters merged into it"
        raise ConfigError("model.path", rule, got=str(source.folder), fix="Name the model that it was quantized from.")
    if len({adapter.scores for adapter, _ in source.adapters}) > 1:
        rule = "must all be of reward models, or none"
        raise ConfigError("export.adapters", rule, got=[adapter.folder for adapter, _ in source.adapters])
    for adapter, _ in source.adapters:
        for layer in sorted(adapter.layers):
            fact = source.facts.get(f"{layer}.weight")
            if fact is None or len(fact.shape) != 2:
                tied = layer == "lm_head" and getattr(source.config, "tie_word_embeddings", False)
                what = "is the embedding's too, which the adapter leaves as it is" if tied else "is no matrix in the base's files"
                fix = f"The adapter was trained on {adapter.base_model}." if adapter.base_model else ""
                raise ConfigError(
                    adapter.setting, f"must be an adapter that can be merged: {layer} {what}", got=adapter.folder, fix=fix
                )
        for name in adapter.wholes:
            shape = tuple(adapter.whole(name).shape)
            known = source.facts.get(name)
            if (known is None and name != SCORE) or (known is not None and known.shape != shape):
                there = "not in the base" if known is None else f"{list(known.shape)} in the base"
                rule = f"must be an adapter of this base: {name} is {list(shape)} in it and {there}"
                raise ConfigError(adapter.setting, rule, got=adapter.folder)
