"""Builds a policy from settings: loads the model, adds the adapter, quantizes, and sets attention and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raytune_llm.config.adapter import AdapterConfig, SavedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.quantization import NoQuantization, QuantizationConfig
from raytune_llm.errors import ConfigError
from raytune_llm.models import activations, attention, head
from raytune_llm.models.adapters import Adapters, Slots, adapt, bank_of, merge
from raytune_llm.models.attention.isolation import check_isolation, first_chunk, needs_lines
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.frozen_start import KnownStates, frozen_start
from raytune_llm.models.layers import layers
from raytune_llm.models.liger import with_liger
from raytune_llm.models.load import check_trainable, load_config, load_model, model_class, positions
from raytune_llm.models.mtp import PredictionLayers, prediction_layers
from raytune_llm.models.multimodal import is_multimodal, processor_files, text_model
from raytune_llm.models.own_code import check_own_code
from raytune_llm.models.policy import Policy
from raytune_llm.models.quantization import quantization_of, quantize
from raytune_llm.models.scorer import Scorer
from raytune_llm.models.shared import SharedModel
from raytune_llm.models.stored import Files, bring, changes_as_loaded, of_type
from raytune_llm.models.vocabulary import grow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

UNQUANTIZED = NoQuantization(name="none")

WHOLE_FITS = 0.9
"""Fraction of a GPU's free memory that weights may take before quantization. The rest is for a layer that exists in both
forms."""
CHUNK_TOKENS = {"cpu": 128}
"""Device type -> tokens of a chunk of logits, if not the policy's default. On a CPU, chunks are so small that malloc reuses their
memory; larger allocations come from the kernel, which clears every page."""


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products, and the reason. auto: bf16 if the hardware supports it, else fp32, which is faster than bf16
    in software. Raises ConfigError for bf16 on a GPU without it; any CPU can emulate it."""
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_has_bf16()
    if precision == "auto":
        what = "GPU" if on_gpu else "CPU"
        return (torch.bfloat16, f"this {what} multiplies it") if has_bf16 else (torch.float32, f"this {what} multiplies no bf16")
    if precision == "bf16" and on_gpu and not has_bf16:
        raise ConfigError(
            "train.precision",
            f"can't be bf16 on {torch.cuda.get_device_name(device)}, which does not support it",
            got=precision,
            fix="Set fp16 or fp32.",
        )
    return DTYPES[precision], "asked for"


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    return choose_precision(precision, device)[0]


def precision_name(dtype: torch.dtype) -> str:
    """The precision's name in train.precision."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware: with AVX512-BF16 or AMX, or the bf16 extension of Arm."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(f" {flag} " in flags.replace("\n", " ") for flag in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass(frozen=True, kw_only=True)
class ForTraining:
    """How a policy that is trained is built."""

    adapter_seed: int | None = None
    """The seed of a new adapter's weights, if it is not that of other random weights."""
    slots: Slots | None = None
    """Build a bank with these empty slots instead of an adapter."""
    compile_layers: bool = False
    cuda_graphs: bool = False
    activation_checkpointing: str = "none"
    starts_once: bool = False
    """Compute the frozen layers at the start once for each batch."""
    trains_again: bool = False
    """Do so for training batches too, since they are trained on more than once."""


def build_policy(
    config: PretrainedConfig,
    model: ModelConfig,
    adapter: AdapterConfig | SavedAdapter,
    *,
    compute: torch.dtype,
    seed: int,
    device: torch.device,
    runs_on: torch.device | None = None,
    quantization: QuantizationConfig = UNQUANTIZED,
    scores: bool = False,
    separate_head: bool = False,
    training: ForTraining | None = ForTraining(),
    files: Files | None = None,
    first_pieces: Mapping[int, Sequence[int]] = MappingProxyType({}),
    shared: SharedModel | None = None,
) -> tuple[Policy, str]:
    """The policy on `device`, and the reason for its attention back end. Frozen weights are in the compute type, trained ones in
    float32.

    device: where weights are loaded to; meta: the policy has no weights and takes no memory. runs_on: the device that it is moved
    to later; frozen weights that are quantized go there one layer at a time. scores: build a Scorer instead of a CausalLM.
    separate_head: save the Scorer's head beside a language model. training: None if nothing is trained, not even an adapter.
    files: read weights from these files when they are quantized; with the meta device, leave them there for a strategy to read.
    first_pieces: new token -> tokens whose mean embedding it starts from; with an adapter, the adapter has the new embeddings.
    shared: keeps a frozen base's weights for the next model.
    """
    runs_on = runs_on or device
    in_lines = needs_lines(config, model_class(config))
    backend, reason = _attention(model, config, runs_on, compute, in_lines=in_lines)
    frozen = not adapter.trains_base or training is None
    load = partial(
        load_model,
        config,
        model.path,
        weights=model.weights,
        seed=seed,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    quantizes = frozen and quantization.replaces_layers and device.type != "meta"
    if quantizes and files is None and model.weights == "pretrained" and device.type == "cuda":
        whole = load(dtype=compute, device="meta", scores=scores)
        device = room_for(whole, device, free_bytes=torch.cuda.mem_get_info(device)[0])
    read = partial(load, dtype=compute if frozen else torch.float32, device=device, scores=scores, files=files)
    changes = adapter.changes_base or model.merged_adapters or first_pieces
    known = KnownStates()
    if shared is not None and frozen and files is None and device.type != "meta" and not changes:
        loaded = shared.copy_of(repr((model, config.to_json_string(), compute, device, seed, scores)), read)
        known = shared.known
    else:
        loaded = read()
    check_own_code(loaded)
    merge(loaded, model.merged_adapters)
    if not in_lines:
        attention.attach(loaded, backend)
    base_vocabulary = config.get_text_config().vocab_size
    grow(loaded, first_pieces)
    if not scores:
        _check_head(loaded)
    moves_to = runs_on if quantizes or (files is not None and device.type != "meta") else None
    hold = partial(_hold, loaded, quantization, compute=compute, runs_on=runs_on, narrows=not frozen, moves_to=moves_to)
    if training is not None and training.slots is not None:
        hold(loaded.requires_grad_(False))  # the bank is added after quantization, which needs frozen weights
        adapted = bank_of(loaded, training.slots, compute)
    else:
        drawn_with = seed if training is None or training.adapter_seed is None else training.adapter_seed
        adapted = _adapted(loaded, adapter, quantization, drawn_with, scores=scores, new_ids=sorted(first_pieces))
        if training is None:
            adapted.model.requires_grad_(False)  # only frozen weights can be quantized
        hold(adapted.model)
        if quantization.replaces_layers:
            adapted.quantized()
    options = training or ForTraining()
    if model.liger_kernel and training is not None:
        with_liger(loaded, runs_on.type)
    activations.keep(loaded, layers(loaded), options.activation_checkpointing, compile_layers=options.compile_layers)
    if scores:
        kind = partial(Scorer, language_model=partial(load, dtype=compute) if separate_head else None)
    else:
        kind = partial(CausalLM, chunk_tokens=CHUNK_TOKENS.get(runs_on.type, head.CHUNK_TOKENS))
    more = predicts_more(config, model, adapter, scores=scores, grows=bool(first_pieces))
    made = kind(
        adapted.model,
        compute=compute,
        attention_backend=backend,
        in_lines=in_lines,
        compiled=options.compile_layers,
        offloads=options.activation_checkpointing == "offload" and runs_on.type == "cuda",
        cuda_graphs=options.cuda_graphs,
        adapters=adapted,
        has_new_adapter=adapter.starts_at_base,
        has_changed_config=bool(model.config) or model.positions is not None,
        base_vocabulary=base_vocabulary,
        shift_attn_tokens=model.shift_attn_tokens,
        **_saved_beside(config, model, loaded, partial(load, dtype=compute, scores=scores, text_only=False), more),
    )
    if options.starts_once:
        made.frozen_start = frozen_start(loaded, known, trains_again=options.trains_again)
    return made, f"attention: {backend} ({reason}{_attention_in_training(config, model) if training is not None else ''})"


def _attention_in_training(config: PretrainedConfig, model: ModelConfig) -> str:
    """What differs in training, as the end of a sentence."""
    dropout = attention.dropout_of(config)
    left_out = f"; without the model's attention dropout of {dropout:g}" if dropout else ""
    groups = "" if model.shift_attn_tokens is None else f"; in groups of {model.shift_attn_tokens} tokens"
    return left_out + groups


def _saved_beside(
    config: PretrainedConfig,
    model: ModelConfig,
    loaded: PreTrainedModel,
    load_whole: Callable[[], PreTrainedModel],
    more: PredictionLayers | None,
) -> dict[str, Any]:
    """Arguments of a Policy about weights and files of the base that are saved with a whole model but are no part of it. more:
    its layers for multi-token prediction."""
    weights: list[Callable[[], Mapping[str, Tensor]]] = [] if more is None else [more.read]
    if not is_multimodal(config):
        return {"left_out": partial(_joined, weights)}
    weights.append(partial(_other_media, loaded, load_whole))
    return {"left_out": partial(_joined, weights), "files_beside": partial(processor_files, model.path, model.revision)}


def _attention(
    model: ModelConfig, config: PretrainedConfig, runs_on: torch.device, compute: torch.dtype, *, in_lines: bool
) -> tuple[str, str]:
    """The attention back end, and the reason for it. in_lines: the model's own layers are used, with one document per row."""
    if in_lines:
        return attention.own_layers(model.attention, config)
    return attention.choose(model.attention, attention.case_of(config, runs_on.type, attention.capability_of(runs_on), compute))


def _adapted(
    model: PreTrainedModel,
    adapter: AdapterConfig | SavedAdapter,
    quantization: QuantizationConfig,
    seed: int,
    *,
    scores: bool,
    new_ids: Sequence[int],
) -> Adapters:
    """The model with its adapter. New weights are drawn with the seed. quantization: how the base will be quantized."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return adapt(model, adapter, scores=scores, new_ids=new_ids, quantization=quantization_of(quantization))


def _hold(
    base: PreTrainedModel,
    quantization: QuantizationConfig,
    adapted: nn.Module,
    *,
    compute: torch.dtype,
    runs_on: torch.device,
    narrows: bool,
    moves_to: torch.device | None,
) -> None:
    """Convert or quantize the base's frozen weights for computation. narrows: frozen weights were loaded in the type of trained
    ones. moves_to: the device that everything is moved to, after the layers were quantized there one by one."""
    if narrows:
        _narrow_frozen(base, compute)
    quantize(layers(base), quantization, runs_on)
    if moves_to is not None:
        bring(adapted, moves_to)


def room_for(model: PreTrainedModel, device: torch.device, *, free_bytes: float) -> torch.device:
    """The device to load weights to that are then quantized layer by layer: `device`, or host memory if they don't fit there
    before they are quantized. model: the model without weights."""
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    needed = 2 * whole if changes_as_loaded(model) else whole  # transformers reads ahead of what it converts
    return device if needed < WHOLE_FITS * free_bytes else torch.device("cpu")


def _narrow_frozen(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Convert the frozen part of a partly trained model to the compute type. It was loaded in the type of the trained part."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = of_type(parameter, compute)


def predicts_more(
    config: PretrainedConfig, model: ModelConfig, adapter: AdapterConfig | SavedAdapter, *, scores: bool, grows: bool
) -> PredictionLayers | None:
    """The base's layers for multi-token prediction, if a whole language model is saved; else None. grows: it gets new tokens."""
    if scores or not adapter.trains_base or model.path is None or model.weights != "pretrained":
        return None
    return prediction_layers(config, model.path, model.revision, grows=grows or adapter.changes_base)


def _joined(parts: Sequence[Callable[[], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part().items()}


def _other_media(model: PreTrainedModel, load: Callable[[], PreTrainedModel]) -> dict[str, Tensor]:
    """The weights of the whole model that `model` lacks, by name."""
    own = model.state_dict().keys()
    return {name: value for name, value in load().named_parameters() if name not in own}


def _check_head(model: PreTrainedModel) -> None:
    """Raises ConfigError if anything but the head follows the last hidden states: logits are computed from them (CausalLM)."""
    more = list(_beside(model, (model.base_model, text_model(model), model.get_output_embeddings())))
    if more:
        raise ConfigError(
            "model.path",
            f"must be a model with only a head over its last hidden states; {model.config.model_type} has {more[0]}",
            got=model.config.name_or_path or model.config.model_type,
        )


def _beside(module: nn.Module, parts: Sequence[nn.Module | None]) -> Iterator[str]:
    """Names of submodules with parameters that neither are one of the parts nor contain one."""
    for name, child in module.named_children():
        if any(held in parts for held in child.modules()):
            yield from () if child in parts else _beside(child, parts)
        elif any(True for _ in child.parameters()):
            yield name


def run_config(model: ModelConfig, tokenizer: Any, max_length: int, *, packing: bool = False) -> PretrainedConfig:
    """The transformers config of the run's model. Without model.path, vocabulary size and special tokens follow from the
    tokenizer. packing: several rows share a row of the batch."""
    for name in attention.DROPOUT:
        if model.config.get(name):
            raise ConfigError(
                f"model.config.{name}",
                "must be 0, since attention is trained without dropout",
                got=model.config[name],
                fix="Leave it out; adapter.dropout is for LoRA.",
            )
    changes: Mapping[str, Any] = model.config
    if model.path is None:
        special_tokens = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        changes = {"vocab_size": len(tokenizer), **special_tokens, **model.config}
    config = load_config(model.path, changes, **model.config_options)
    check_trainable(config)
    if (known := model_class(config)) is not None:
        check_isolation(config, known, packing=packing)
        if needs_lines(config, known):
            attention.own_layers(model.attention, config)
    if model.shift_attn_tokens is not None:
        attention.check_groups(config, model.shift_attn_tokens, max_length)
    limit = positions(config)
    if limit is not None and max_length > limit:
        fix = "Lower it." if limit == first_chunk(config) else "Lower it, or set model.positions and model.rope_scaling."
        raise ConfigError("data.max_length", f"must be at most the model's {limit} positions", got=max_length, fix=fix)
    _check_scaled_positions(config, max_length)
    if len(tokenizer) > config.get_text_config().vocab_size and not model.adds_tokens:
        raise ConfigError(
            "model.tokenizer",
            f"must have at most the model's {config.get_text_config().vocab_size} entries",
            got=len(tokenizer),
            fix="Set model.tokenizer=null to use the model's own.",
        )
    return config


def _check_scaled_positions(config: PretrainedConfig, max_length: int) -> None:
    """Raises ConfigError if a row's rotary positions would depend on the other rows of its batch: LongRoPE (Ding et al. 2024,
    arXiv 2402.13753) has other frequencies for texts longer than the original maximum, and transformers decides by the longest
    row."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original is not None and max_length > original:
        raise ConfigError(
            "data.max_length",
            f"must be at most {original}, the positions before LongRoPE's scaling: longer rows would change those beside them",
            got=max_length,
            fix="Lower it.",
        )
