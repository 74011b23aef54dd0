"""The source of an export: the base's files, and the adapters that are merged when its tensors are read."""

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
from huggingface_hub.errors import RevisionNotFoundError
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CHAT_TEMPLATE_DIR

from raytune_llm import packaged
from raytune_llm.config.export import ALONE, ExportConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.run import ExportRun, TrainRun
from raytune_llm.errors import ConfigError, first_line
from raytune_llm.export.in_quantized import base_in_bits, in_quantized, is_quantized, without_quantization
from raytune_llm.export.tensors import TensorFact, TensorFiles, Tensors, converted
from raytune_llm.finished import FINAL
from raytune_llm.hub import hub_failures
from raytune_llm.models.adapters.low_rank import LowRank, added
from raytune_llm.models.adapters.mergeable import Mergeable
from raytune_llm.models.adapters.method import tied_ends, ties_ends
from raytune_llm.models.adapters.saved import changes_one_end, has_new_tokens, other_base
from raytune_llm.models.finite import all_finite
from raytune_llm.models.load import load_config, load_model
from raytune_llm.models.stored import changes_as_loaded, other_shape, tensor_files
from raytune_llm.runs.trained import read_trained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORE, HEAD = "score.weight", "lm_head.weight"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
NOT_COPIED = ("README.md", "adapter_config.json", "LICENSE", ".gitattributes", "training_args.json")
NOT_FOR_MODELS = ("config.json", *NOT_COPIED)
OF_QUANTIZED = ("quantize_config.json", "quant_config.json")
"""Files in which GPTQ and AWQ repeat the quantization config. Some programs read them instead of config.json."""


@dataclass(frozen=True)
class Source:
    model: ModelConfig
    folder: Path
    """The base's folder."""
    stored: Tensors
    """The base's tensors."""
    adapters: Sequence[tuple[Mergeable, float]]
    """(adapter, its weight), ..."""
    under: Sequence[Mergeable]
    """Adapters that were merged into the base before these were trained, in their order (model.merged_adapters)."""
    beside: Path | None
    """The final/ of a run, with its tokenizer, generation config, and config if the run changed that."""
    run: TrainRun | None
    into_quantized: str | None = None
    """A sentence for the card about dequantized weights (export.into_quantized)."""

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """Name -> shape and dtype of the base's tensors."""
        return self.stored.facts

    @property
    def scores(self) -> bool:
        """Whether it is a reward model, with a score head instead of the language model's."""
        return SCORE in self.facts or any(adapter.scores for adapter in (*self.under, *(one for one, _ in self.adapters)))

    @cached_property
    def config(self) -> PretrainedConfig:
        folder = self.beside if self.beside is not None and (self.beside / "config.json").is_file() else self.folder
        config = load_config(str(folder), {}, trust_remote_code=self.model.trust_remote_code)
        if self.into_quantized is not None:
            config = without_quantization(config)
        text = config.get_text_config()
        text.vocab_size = max([text.vocab_size, *(id + 1 for id in self.token_ids)])
        return config

    @cached_property
    def token_ids(self) -> list[int]:
        """The tokens whose embeddings belong to an adapter."""
        return [id for adapter, _ in self.adapters if adapter.token_rows for id in adapter.token_ids]

    def _own_tokens(self, name: str) -> tuple[Mergeable, str] | None:
        """The adapter that has rows of new tokens for this weight, and the weight's name in it (a tied head has the
        embedding's)."""
        for adapter, _ in self.adapters:
            if name in adapter.token_rows:
                return adapter, name
            if name == HEAD and self.ties_head and adapter.token_rows:
                return adapter, next(iter(adapter.token_rows))
        return None

    @property
    def name(self) -> str:
        return self.run.name if self.run is not None else Path(str(self.model.path)).name

    @property
    def other_bases(self) -> list[str]:
        """Warnings about adapters that were trained on another model."""
        said = (other_base(adapter.folder, adapter.setting, self.model.base_name) for adapter, _ in self.adapters)
        return [line for line in said if line is not None]

    @property
    def vocab_size(self) -> int:
        """The number of embeddings."""
        return self.config.get_text_config().vocab_size

    @property
    def ties_head(self) -> bool:
        """Whether the head is tied to the embedding."""
        return ties_ends(self.config)

    @cached_property
    def tied_weights(self) -> frozenset[str]:
        """The weights' names of the embedding and the head if they are tied; a reward model has no head."""
        if not self.ties_head or self.scores:
            return frozenset()
        return frozenset(f"{name}.weight" for name in tied_ends(self.empty_model()))

    def empty_model(self) -> PreTrainedModel:
        """The base's model on the meta device."""
        made: dict[str, Any] = {"weights": "random", "dtype": torch.float32, "seed": 0, "device": "meta"}
        return load_model(self.config, None, **made, trust_remote_code=self.model.trust_remote_code)

    def fact_of(self, name: str) -> TensorFact | None:
        """The name of a weight in the base's files, which may only have one of two tied weights."""
        if name in self.facts or name != HEAD:
            return self.facts.get(name)
        return next((self.facts[tied] for tied in self.tied_weights - {name} if tied in self.facts), None)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The end tokens in the generation config; empty if it has none."""
        for folder in filter(None, (self.beside, self.folder)):
            if (file := folder / "generation_config.json").is_file():
                stops = json.loads(file.read_text()).get("eos_token_id")
                return [stops] if isinstance(stops, int) else list(stops or [])
        return []

    @cached_property
    def wholes(self) -> dict[str, Mergeable]:
        """Name -> adapter, for weights that an adapter replaces (modules_to_save). One of `adapters` replaces them after those of
        `under`, whose last one counts."""
        found: dict[str, Mergeable] = {}
        for adapter, _ in self.adapters:
            for name in adapter.wholes:
                if name in found:
                    rule = f"can't be merged: {name} is whole in two of them, {found[name].folder} and {adapter.folder}"
                    raise ConfigError("export.adapters", rule)
                found[name] = adapter
        return {name: adapter for adapter in self.under for name in adapter.wholes} | found

    def outputs(self, dtype: torch.dtype | None) -> list[TensorFact]:
        """Name, shape and dtype of the merged model's tensors. dtype None: each keeps that of the base. Raises ConfigError for an
        adapter that can't be merged into this base."""
        for adapter in (*self.under, *(adapter for adapter, _ in self.adapters)):
            if apart := sorted(self.tied_weights & adapter.changed_apart):
                raise changes_one_end(apart[0], adapter.folder, adapter.setting)
        facts = [fact for name, fact in self.facts.items() if not (self.scores and name == HEAD)]
        common = next((fact.dtype for fact in facts if fact.dtype.is_floating_point), torch.float32)
        for name in self.wholes.keys() - self.facts.keys():
            facts.append(TensorFact(name, tuple(self.wholes[name].whole(name).shape), common))
        facts = [self._grown(fact) for fact in facts]
        return [replace(fact, dtype=dtype) if dtype is not None and fact.dtype.is_floating_point else fact for fact in facts]

    def _grown(self, fact: TensorFact) -> TensorFact:
        """The shape including the rows of new tokens."""
        if self._own_tokens(fact.name) is None:
            return fact
        rows = max(fact.shape[0], *(id + 1 for id in self.token_ids))
        return replace(fact, shape=(rows, *fact.shape[1:]))

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor with all adapters merged. Raises ConfigError if the dtype can't represent a value."""
        if terms := self._terms(name):
            return added(self.stored.read(name), terms, lambda wide: converted(name, self._summed(name, wide), dtype))
        return converted(name, self._merged(name), dtype)

    def _terms(self, name: str) -> list[LowRank]:
        """What the adapters add to this weight if all that change it only add to it. Otherwise empty."""
        if name not in self.facts or self._own_tokens(name) is not None:
            return []
        adapters = (*((adapter, 1.0) for adapter in self.under), *self.adapters)
        changing = [(adapter, factor) for adapter, factor in adapters if name in adapter.wholes or adapter.changes(name)]
        terms = []
        for adapter, factor in changing:
            if name in adapter.wholes or (term := adapter.low_rank(name)) is None:
                return []
            terms.append(replace(term, b_OR=factor * term.b_OR))
        return terms

    def _merged(self, name: str) -> Tensor:
        merged = self._without_tokens(name)
        own = self._own_tokens(name)
        return merged if own is None else own[0].with_tokens(own[1], merged)

    def _without_tokens(self, name: str) -> Tensor:
        if name not in self.facts:
            return self.wholes[name].whole(name)
        value = self.stored.read(name)
        for adapter in self.under:
            merged = _with(adapter, name, value)
            value = value if merged is None else merged
        made = [(one, factor) for adapter, factor in self.adapters if (one := _with(adapter, name, value)) is not None]
        if not made:
            return value
        if len(made) == 1 and made[0][1] == 1.0:
            return made[0][0]
        wide = value.float()
        return self._summed(name, wide + sum(factor * (one.float() - wide) for one, factor in made))

    def _summed(self, name: str, wide: Tensor) -> Tensor:
        """Raises ConfigError for sums that export.weights made too large."""
        factors = {adapter.folder: factor for adapter, factor in self.adapters}
        if list(factors.values()) != [1.0] and not all_finite(wide):
            raise ConfigError("export.weights", f"must result in finite numbers in {name}", got=factors, fix="Lower them.")
        return wide

    def copy_others(self, folder: Path) -> None:
        """The files to copy: tokenizer, generation config, code; not weights and config."""
        for name, file in self.others.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)

    @cached_property
    def others(self) -> dict[str, Path]:
        """Name -> file, for files that are copied unchanged."""
        left_out = {*NOT_FOR_MODELS, *(() if self.into_quantized is None else OF_QUANTIZED)}
        return {
            str(file.relative_to(place)): file
            for place in filter(None, (self.folder, self.beside))
            for file in sorted((*place.iterdir(), *(place / CHAT_TEMPLATE_DIR).glob("*")))
            if file.is_file() and file.name not in left_out and not file.name.endswith(WEIGHT_SUFFIXES)
        }

    def config_json(self, dtype: torch.dtype | None) -> dict[str, Any]:
        folder = self.beside if self.beside is not None and (self.beside / "config.json").is_file() else self.folder
        values = json.loads((folder / "config.json").read_text())
        if self.into_quantized is not None:
            values.pop("quantization_config", None)
        if dtype is not None:
            values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
        if self.token_ids:
            text = values.get("text_config", values)
            text["vocab_size"] = max(text["vocab_size"], self.vocab_size)
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


def _transposed(source: Source, adapter: Mergeable) -> frozenset[str]:
    """The adapter's layers whose weights are [inputs, outputs]."""
    modules = dict(source.empty_model().named_modules()) if adapter.of_conv1d else {}
    return frozenset(layer for layer in adapter.layers if isinstance(modules.get(layer), Conv1D))


def _with(adapter: Mergeable, name: str, value: Tensor) -> Tensor | None:
    """The weight or bias with this adapter merged; None if the adapter does not change it."""
    if name in adapter.wholes:
        return adapter.whole(name)
    return adapter.merged(name, value) if adapter.changes(name) else None


def _name_of(folder: Path) -> str:
    """The adapter's name in export.weights: the name of its folder, or of its run's."""
    return folder.absolute().parent.name if folder.name == FINAL else folder.absolute().name


def _before(named: Mapping[str, tuple[str, str]], name: str, folder: str, setting: str) -> dict[str, tuple[str, str]]:
    """`named` (name -> adapter's folder and the setting that names it) with one more adapter in front. Raises ConfigError if its
    name is taken."""
    if name in named:
        rule = f"must not have the name {name}, which is that of {setting}"
        raise ConfigError("export.adapters", rule, got=sorted(named), fix="Choose another name.")
    return {name: (folder, setting), **named}


def source_of(run: ExportRun) -> Source:
    """The source by the settings. Raises ConfigError for what can't be exported."""
    export = run.export
    model, beside, trained_run = run.model, None, None
    named = {name: (folder, f"export.adapters.{name}") for name, folder in export.adapters.items()}
    if run.adapter.path is not None:
        named = _before(named, _name_of(Path(run.adapter.path)), run.adapter.path, "adapter.path")
    if export.run is not None:
        trained = read_trained(export.run, "export.run")
        model, trained_run, beside = trained.model, trained.run, trained.final
        if trained.adapter is not None:
            named = _before(named, trained.name, str(trained.adapter), "export.run")
    if unknown := sorted(export.weights.keys() - named.keys()):
        raise ConfigError("export.weights", f"must have names of adapters ({', '.join(named) or 'none is given'})", got=unknown)
    adapters = [(Mergeable(*where), export.weights.get(name, 1.0)) for name, where in named.items()]
    under = [Mergeable(path, "model.merged_adapters") for path in model.merged_adapters]
    trained_in = None if trained_run is None else trained_run.quantization
    _check_base(model, trained_in, export)
    assert model.path is not None
    folder = Path(packaged.resolve(model.path))
    if not folder.is_dir():
        folder = _downloaded(model.path, model.revision)
    if beside is None and len(adapters) == 1 and (Path(adapters[0][0].folder) / "tokenizer_config.json").is_file():
        beside = Path(adapters[0][0].folder)
    files = tensor_files(str(folder), None)
    if not files:
        fix = "Save the model with transformers first."
        raise ConfigError("model.path", "must have its weights as safetensors", got=str(folder), fix=fix)
    stored, into = TensorFiles(files), None
    config = load_config(str(folder), {}, trust_remote_code=model.trust_remote_code)
    if export.into_quantized or (export.format in ALONE and is_quantized(config)):  # an adapter is of the weights as unpacked
        stored, said = in_quantized(stored, config, trained_in, str(folder), trust_remote_code=model.trust_remote_code)
        into = said if export.into_quantized else None
    source = Source(model, folder, stored, adapters, under, None if beside == folder else beside, trained_run, into)
    _check_files(source)
    _check(source, merges=export.format not in ALONE)
    return source


def check_to_come(run: TrainRun, export: ExportConfig) -> None:
    """Raises ConfigError if the adapter of a run that is not trained yet can't be merged into its base."""
    if not run.adapter.trains_base:
        _check_base(run.model, run.quantization, export)


def _check_base(model: ModelConfig, trained_in: QuantizationConfig | None, export: ExportConfig) -> None:
    """Raises ConfigError for what the base's config shows, before its weights are downloaded. trained_in: the quantization of the
    run."""
    if model.path is None:
        rule = "must be a run whose base has a path: an adapter of random weights can't be merged"
        raise ConfigError("export.run", rule, got=export.run)
    if export.into_quantized:
        code = model.trust_remote_code
        config = load_config(model.path, {}, revision=model.revision, trust_remote_code=code)
        base_in_bits(config, trained_in, model.path, trust_remote_code=code)


def _downloaded(name: str, revision: str | None) -> Path:
    """The local folder of a hub's model. Raises ConfigError for an unknown name, and if the hub can't be reached."""
    try:
        return Path(snapshot_download(name, revision=revision))
    except RevisionNotFoundError as error:
        rule = f"must be a revision of {name} ({first_line(error)})"
        raise ConfigError("model.revision", rule, got=revision) from error
    except hub_failures() as error:
        rule = f"must be a folder, or a model that the hub gives ({first_line(error)})"
        raise ConfigError("model.path", rule, got=name, fix="Correct the name, or set HF_TOKEN where it is private.") from error


def _check_files(source: Source) -> None:
    """Raises ConfigError if the shapes in the files differ from those of config.json's model, and for other damaged files."""
    config = load_config(str(source.folder), {}, trust_remote_code=source.model.trust_remote_code)
    made: dict[str, Any] = {"weights": "random", "dtype": torch.float32, "seed": 0, "device": "meta"}
    try:
        model = load_model(config, None, **made, trust_remote_code=source.model.trust_remote_code)
    except ConfigError:
        model = None  # not a causal language model: its tensors are copied without this check
    except Exception as error:  # a damaged config.json may raise anything in a model's code
        rule = f"must be a folder whose config.json is of a model ({type(error).__name__}: {first_line(error)})"
        raise ConfigError("model.path", rule, got=str(source.folder), fix="Copy the whole folder again.") from error
    if model is not None and not changes_as_loaded(model):
        for name, weight in model.named_parameters():
            if (fact := source.facts.get(name)) is not None and fact.shape != tuple(weight.shape):
                raise other_shape(str(source.folder), name, fact.shape, list(weight.shape))
    for file in source.others.values():
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except (ValueError, RecursionError) as error:
            beside = source.adapters[0][0].setting if source.adapters else "export.run"
            setting = "model.path" if file.is_relative_to(source.folder) else beside
            rule = f"must be a folder whose {file.name} can be read ({first_line(error)})"
            raise ConfigError(setting, rule, got=str(file.parent), fix="Copy that file again.") from None


def _check(source: Source, *, merges: bool) -> None:
    if merges and source.adapters and is_quantized(source.config):
        rule = "must not be quantized, to have adapters merged into it"
        fix = "Name the model that it was quantized from, or set export.into_quantized=true."
        raise ConfigError("model.path", rule, got=str(source.folder), fix=fix)
    if len({adapter.scores for adapter, _ in source.adapters}) > 1:
        rule = "must all be of reward models, or none"
        raise ConfigError("export.adapters", rule, got=[adapter.folder for adapter, _ in source.adapters])
    with_tokens = [(adapter, factor) for adapter, factor in source.adapters if adapter.token_rows]
    if len(with_tokens) > 1 or any(factor != 1.0 for _, factor in with_tokens):
        rule = "can have one adapter with new tokens, whose weight is 1: their embeddings can't be added up"
        raise ConfigError("export.adapters", rule, got=[adapter.folder for adapter, _ in with_tokens])
    for adapter in source.under:
        if adapter.token_rows:
            raise has_new_tokens(adapter.folder, adapter.setting)
        if adapter.scores and not all(above.scores for above, _ in source.adapters):
            rule = "must not be a reward model's adapter below one of a language model"
            raise ConfigError(adapter.setting, rule, got=adapter.folder)
    factors = {adapter.folder: factor for adapter, factor in source.adapters}
    for adapter in (*source.under, *(adapter for adapter, _ in source.adapters)):
        if missing := sorted(adapter.token_rows.keys() - source.facts.keys()):
            rule = f"must be an adapter of this base, whose files have no {missing[0]}"
            raise ConfigError(adapter.setting, rule, got=adapter.folder)
        for layer in sorted(adapter.layers):
            fact = source.fact_of(f"{layer}.weight")
            if fact is None or len(fact.shape) != 2:
                what = "is not in the base" if fact is None else "is not a matrix in the base"
                fix = f"The adapter was trained on {adapter.base_model}." if adapter.base_model else ""
                raise ConfigError(
                    adapter.setting, f"must be an adapter that can be merged: {layer} {what}", got=adapter.folder, fix=fix
                )
        facts = {layer: source.fact_of(f"{layer}.weight") for layer in adapter.layers}
        adapter.fit({layer: fact.shape for layer, fact in facts.items() if fact is not None}, _transposed(source, adapter))
        if adapter.has_experts:
            adapter.fit_experts(source.empty_model(), {name: fact.shape for name, fact in source.facts.items()})
        for name in adapter.wholes:
            if name not in source.facts and factors.get(adapter.folder, 1.0) != 1.0:
                rule = f"must be 1 for an adapter with a whole {name}, of which the base has none"
                raise ConfigError("export.weights", rule, got=factors[adapter.folder], fix="Leave it out.")
            shape = tuple(adapter.whole(name).shape)
            known = source.facts.get(name)
            if (known is None and name != SCORE) or (known is not None and known.shape != shape):
                there = "not in the base" if known is None else f"{list(known.shape)} in the base"
                rule = f"must be an adapter of this base: {name} is {list(shape)} in it and {there}"
                raise ConfigError(adapter.setting, rule, got=adapter.folder)
