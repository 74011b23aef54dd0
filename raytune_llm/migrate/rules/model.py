"""The task, the model, its quantization, and its adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raytune_llm.errors import NOT_YAML, first_line
from raytune_llm.migrate.argument_rules import NoEffect, Refusal, Settings
from raytune_llm.migrate.rules.stage import PAIR_STAGES
from raytune_llm.migrate.rules.values import LATER, Find, listed


def attention(flash_attn: str) -> str:
    known = {"auto": "auto", "fa2": "auto", "fa3": "auto", "sdpa": "sdpa", "disabled": "sdpa"}
    if flash_attn not in known:
        raise Refusal(f"must be one of {', '.join(known)}")
    return known[flash_attn]


def task(do_train: bool, do_predict: bool, predict_with_generate: bool) -> NoEffect:
    if do_predict or predict_with_generate:
        why = "only training is imported; the verb predict answers rows with the model of a run (predict.run=OUTPUT)"
        raise Refusal(why, "do_predict" if do_predict else "predict_with_generate")
    if not do_train:
        raise Refusal("only training is imported", "do_train")
    return NoEffect("only training is imported")


def model(model_name_or_path: str | None) -> Settings:
    if model_name_or_path is None:
        raise Refusal("must name a model")
    return {"model": "hub", "model.path": model_name_or_path}


def weights(train_from_scratch: bool) -> Settings:
    return {"model.weights": "random" if train_from_scratch else "pretrained"}


ROPE_SCALINGS = ("linear", "dynamic", "yarn", "llama3")


def positions(rope_scaling: str | None, cutoff_len: int) -> Settings:
    """There, the factor is that of cutoff_len over the model's positions, rounded up, and a model that is scaled already is
    scaled anew from its original positions; here it is left as it is where it has enough."""
    if rope_scaling is None:
        return {"model.rope_scaling": None, "model.positions": None}
    if rope_scaling not in ROPE_SCALINGS:
        raise Refusal(f"must be one of {', '.join(ROPE_SCALINGS)}", "rope_scaling")
    return {"model.rope_scaling": rope_scaling, "model.positions": cutoff_len}


def shifted_attention(shift_attn: bool, cutoff_len: int, stage: str, pref_loss: str) -> Settings:
    """There, groups are a quarter of a padded batch, counted in it, and the first half group of a row sees the last one. Here,
    they are a quarter of the longest row that there can be, counted in each row, and the first half group sees itself."""
    if not shift_attn:
        return {"model.shift_attn_tokens": None}
    if stage == "kto" or (stage == "dpo" and PAIR_STAGES.get(pref_loss) == "dpo"):
        raise Refusal("can't be combined with a stage whose reference attends to all", "shift_attn")
    if cutoff_len < 8:
        raise Refusal("needs a cutoff_len of at least 8: groups are a quarter of it, and move by half of that", "shift_attn")
    return {"model.shift_attn_tokens": cutoff_len // 8 * 2}


def new_tokens(
    add_tokens: str | Sequence[str] | None,
    add_special_tokens: str | Sequence[str] | None,
    new_special_tokens_config: str | Mapping[str, str] | None,
    init_special_tokens: str,
    find: Find,
) -> Settings | NoEffect:
    """There, the file wins over add_special_tokens, and special tokens too are read in the texts of rows.

    New embeddings begin there as the mean of all, with noise; here as that of the token's pieces, or of its description.
    """
    described = _descriptions(new_special_tokens_config, find)
    special = list(described) if described else listed(add_special_tokens or ())
    tokens = list(dict.fromkeys(str(token) for token in (*listed(add_tokens or ()), *special)))
    if not tokens:
        return NoEffect("there are no new tokens")
    if init_special_tokens == "desc_init_w_noise":
        raise Refusal("noise is not added to descriptions; set desc_init", "init_special_tokens")
    if described and init_special_tokens == "desc_init":
        return {"model.new_tokens": {token: described.get(token, token) for token in tokens}}
    return {"model.new_tokens": tokens}


def _descriptions(given: str | Mapping[str, str] | None, find: Find) -> Mapping[str, str]:
    if given is None or isinstance(given, Mapping):
        return given or {}
    found = find(given)
    if found is None:
        raise Refusal("there is no such file", "new_special_tokens_config")
    try:
        read = yaml.safe_load(Path(found).read_text(encoding="utf-8"))
    except (OSError, *NOT_YAML) as error:
        raise Refusal(f"can't be read ({first_line(error)})", "new_special_tokens_config") from None
    if not isinstance(read, dict) or not all(isinstance(text, str) for pair in read.items() for text in pair):
        raise Refusal("must hold a description (text) for each token", "new_special_tokens_config")
    return read


QUANTIZED = re.compile(r"gptq|awq|aqlm|hqq|bnb", re.IGNORECASE)
"""In the name of a model that comes quantized."""


def quantization(
    quantization_bit: int | None,
    quantization_method: str,
    quantization_type: str,
    double_quantization: bool,
    model_name_or_path: str | None,
    fp8: bool,
) -> Settings | NoEffect:
    """There, a model that comes quantized stays as it is, whatever is asked; here its weights are unpacked. fp8: products of all
    linear layers but the head, as there."""
    if fp8 and quantization_bit is not None:
        raise Refusal("weights in few bits have products in the run's precision; leave one of the two out", "fp8")
    if fp8:
        return {"quantization": "fp8", "quantization.skip_modules": []}
    if quantization_bit is None or QUANTIZED.search(Path(model_name_or_path or "").name):
        return {"quantization": "none"}
    if quantization_bit not in (4, 8):
        raise Refusal(f"quantization to {quantization_bit} bits {LATER}; there are 4 and 8", "quantization_bit")
    if str(quantization_method).lower() == "hqq":
        if quantization_bit != 4:
            raise Refusal(f"quantization by hqq to {quantization_bit} bits {LATER}; there are 4", "quantization_bit")
        return {"quantization": "hqq"}
    if str(quantization_method).lower() not in ("bnb", "bitsandbytes"):
        raise Refusal(f"quantization by {quantization_method} {LATER}; there are bnb and hqq", "quantization_method")
    if quantization_bit == 8:
        return {"quantization": "bnb_int8"}
    if quantization_type not in ("nf4", "fp4"):
        raise Refusal(f"quantization to {quantization_type} {LATER}; there are nf4 and fp4", "quantization_type")
    if not double_quantization:
        raise Refusal("scales are always quantized (double quantization); leave it out", "double_quantization")
    return {"quantization": f"bnb_{quantization_type}"}


def adapter(
    finetuning_type: str,
    adapter_name_or_path: str | Sequence[str] | None,
    create_new_adapter: bool,
    lora_rank: int,
    lora_alpha: float | None,
    lora_dropout: float,
    lora_target: str | Sequence[str],
    use_rslora: bool,
    use_dora: bool,
    pissa_init: bool,
    pissa_iter: int,
    loraplus_lr_ratio: float | None,
    loraplus_lr_embedding: float,
    additional_target: str | Sequence[str] | None,
    learning_rate: float,
) -> Settings:
    if finetuning_type in ("full", "freeze"):
        if adapter_name_or_path is not None:
            raise Refusal("works with finetuning_type=lora or oft only", "adapter_name_or_path")
        return {"adapter": "none" if finetuning_type == "full" else "freeze"}
    if finetuning_type not in ("lora", "oft"):
        raise Refusal(f"{finetuning_type} {LATER}; there are lora, oft, freeze and full", "finetuning_type")
    adapters = [] if adapter_name_or_path is None else listed(adapter_name_or_path)
    continued = None if create_new_adapter or not adapters else adapters.pop()
    placed = {
        "adapter.path": continued,
        "model.merged_adapters": adapters,
        "adapter.modules_to_save": [] if additional_target is None else listed(additional_target),
    }
    if finetuning_type == "oft":
        return placed
    own: dict[str, Any] = {"adapter.rslora": use_rslora, "adapter.dora": use_dora}
    if pissa_init:
        own |= {"adapter.svd_iterations": None if pissa_iter == -1 else pissa_iter}
        if continued is not None:
            raise Refusal("is how a new adapter begins; leave it out, or set create_new_adapter", "pissa_init")
    if loraplus_lr_ratio is not None:
        of_embeddings = float(loraplus_lr_embedding) / learning_rate
        own |= {"adapter.lr_ratio": float(loraplus_lr_ratio), "adapter.embedding_lr_ratio": of_embeddings}
    return {
        "adapter": "pissa" if pissa_init else "lora",
        "adapter.rank": lora_rank,
        "adapter.alpha": float(2 * lora_rank if lora_alpha is None else lora_alpha),
        "adapter.dropout": float(lora_dropout),
        "adapter.targets": _targets(lora_target),
        **own,
        **placed,
    }


def freeze(
    finetuning_type: str,
    freeze_trainable_layers: int,
    freeze_trainable_modules: str | Sequence[str],
    freeze_extra_modules: str | Sequence[str] | None,
    use_llama_pro: bool,
) -> Settings | NoEffect:
    if finetuning_type != "freeze":
        return NoEffect("read with finetuning_type=freeze only")
    if freeze_trainable_layers == 0:
        raise Refusal("must be a number of layers: of the last ones, or below zero of the first", "freeze_trainable_layers")
    modules = listed(freeze_trainable_modules)
    last = freeze_trainable_layers > 0
    return {
        "adapter": "freeze",
        "adapter.first_layers": None if last or use_llama_pro else -freeze_trainable_layers,
        "adapter.last_layers": freeze_trainable_layers if last and not use_llama_pro else None,
        "adapter.modules": "all" if modules == ["all"] else modules,
        "adapter.extra_modules": [] if freeze_extra_modules is None else listed(freeze_extra_modules),
    }


def new_blocks(
    use_llama_pro: bool, finetuning_type: str, freeze_trainable_layers: int, model_name_or_path: str | None, find: Find
) -> Settings | NoEffect:
    """There, a script has lengthened the model beforehand: each so many layers end with a new one, and these alone are trained,
    with freeze whole and with lora by adapters."""
    if not use_llama_pro:
        return NoEffect("is not asked for")
    if finetuning_type not in ("lora", "freeze"):
        raise Refusal("works with finetuning_type=freeze or lora only", "use_llama_pro")
    layers = _num_layers(model_name_or_path, find)
    if layers is None:
        why = "needs the config.json of the lengthened model, which is not here"
        fix = "name the new layers with adapter.layers, or lengthen the original model with adapter=llama_pro"
        raise Refusal(f"{why}; {fix}", "use_llama_pro")
    if freeze_trainable_layers < 1 or layers % freeze_trainable_layers:
        raise Refusal(f"must divide the model's {layers} layers with use_llama_pro", "freeze_trainable_layers")
    stride = layers // freeze_trainable_layers
    return {"adapter.layers": list(range(stride - 1, layers, stride))}


def _num_layers(model_name_or_path: str | None, find: Find) -> int | None:
    """The number of layers of a model in a folder; None if its config can't be read."""
    found = None if model_name_or_path is None else find(str(Path(model_name_or_path, "config.json")))
    if found is None:
        return None
    try:
        config = json.loads(Path(found).read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return next((config[name] for name in ("num_hidden_layers", "num_layers", "n_layer") if name in config), None)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def oft(
    finetuning_type: str,
    oft_rank: int,
    oft_block_size: int,
    oft_target: str | Sequence[str],
    lora_target: str | Sequence[str],
    module_dropout: float,
) -> Settings | NoEffect:
    """There, lora_target names the layers of this method too, and oft_target, which is meant to, is not read."""
    if finetuning_type != "oft":
        return NoEffect("read with finetuning_type=oft only")
    if bool(oft_rank) == bool(oft_block_size):
        raise Refusal("PEFT takes one of oft_rank and oft_block_size, there too; set the other to 0", "oft_rank")
    targets = {str(given): given for given in map(_targets, (lora_target, oft_target)) if given != "all-linear"}
    if len(targets) > 1:
        raise Refusal("names other layers than lora_target, which is what is read there; leave one of the two out", "oft_target")
    return {
        "adapter": "oft",
        "adapter.block_size": oft_block_size or None,
        "adapter.blocks": oft_rank or None,
        "adapter.dropout": float(module_dropout),
        "adapter.targets": next(iter(targets.values()), "all-linear"),
    }


def _targets(names: str | Sequence[str]) -> str | list[str]:
    targets = listed(names)
    return "all-linear" if targets == ["all"] else targets
