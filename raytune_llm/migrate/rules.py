"""What several arguments of LLaMA-Factory become together.

A parameter is the argument of that name, with its default where the file does not say it; beside these there are

    world_size      GPUs that the run had, or null
    dataset_info    the dataset_info.json to take, or null for the one in dataset_dir
    find            path -> where that file is, as it can be written into an experiment, or none

Each rule gives settings, or says why its arguments have no effect, or raises Refusal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raytune_llm.data.readers import declarations
from raytune_llm.data.templates import named as named_templates
from raytune_llm.errors import NOT_YAML, UserError, first_line
from raytune_llm.migrate.argument_rules import NoEffect, Refusal, Settings

Find = Callable[[str], str | None]
LATER = "is not supported yet"

# One value -----------------------------------------------------------------------------------------------------------


def attention(flash_attn: str) -> str:
    known = {"auto": "auto", "fa2": "auto", "fa3": "auto", "sdpa": "sdpa", "disabled": "sdpa"}
    if flash_attn not in known:
        raise Refusal(f"must be one of {', '.join(known)}")
    return known[flash_attn]


def numbers(interleave_probs: str | Sequence[float] | None) -> list[float] | None:
    return None if interleave_probs is None else [float(value) for value in _listed(interleave_probs)]


def resume(resume_from_checkpoint: str | bool | None) -> str:
    if isinstance(resume_from_checkpoint, str):
        raise Refusal("checkpoints of LLaMA-Factory can't be resumed; adapter_name_or_path continues a trained adapter")
    return "must" if resume_from_checkpoint else "auto"


def clipping(
    max_grad_norm: float, optim: str, use_galore: bool, galore_layerwise: bool, use_apollo: bool, apollo_layerwise: bool
) -> Settings:
    """Where tensors step one by one, no gradient is left to be clipped, whatever max_grad_norm says."""
    layerwise = optim in ("lomo", "adalomo") or (use_galore and galore_layerwise) or (use_apollo and apollo_layerwise)
    return {"train.max_grad_norm": None if layerwise else max_grad_norm or None}


def whole_steps(steps: float) -> int:
    if steps < 1 or steps != int(steps):
        raise Refusal("fractions of the run are not supported; give a number of steps")
    return int(steps)


# The task and its model ----------------------------------------------------------------------------------------------


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
    special = list(described) if described else _listed(add_special_tokens or ())
    tokens = list(dict.fromkeys(str(token) for token in (*_listed(add_tokens or ()), *special)))
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
    adapters = [] if adapter_name_or_path is None else _listed(adapter_name_or_path)
    continued = None if create_new_adapter or not adapters else adapters.pop()
    placed = {
        "adapter.path": continued,
        "model.merged_adapters": adapters,
        "adapter.modules_to_save": [] if additional_target is None else _listed(additional_target),
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
    modules = _listed(freeze_trainable_modules)
    last = freeze_trainable_layers > 0
    return {
        "adapter": "freeze",
        "adapter.first_layers": None if last or use_llama_pro else -freeze_trainable_layers,
        "adapter.last_layers": freeze_trainable_layers if last and not use_llama_pro else None,
        "adapter.modules": "all" if modules == ["all"] else modules,
        "adapter.extra_modules": [] if freeze_extra_modules is None else _listed(freeze_extra_modules),
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
    """Of a model in a folder."""
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
    targets = _listed(names)
    return "all-linear" if targets == ["all"] else targets


STAGES: Mapping[str, str] = {"sft": "sft", "pt": "pretrain", "rm": "reward", "kto": "kto"}
PAIR_STAGES: Mapping[str, str] = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
"""What stage=dpo is, by its pref_loss."""


def stage(stage: str, pref_loss: str) -> Settings:
    if stage == "dpo":
        if pref_loss not in PAIR_STAGES:
            hint = "; set stage=kto" if pref_loss == "kto_pair" else ""
            raise Refusal(f"must be one of {', '.join(PAIR_STAGES)}{hint}", "pref_loss")
        return {"stage": PAIR_STAGES[pref_loss]}
    if stage not in STAGES:
        raise Refusal(f"{stage} {LATER}; there are {', '.join(STAGES)} and dpo", "stage")
    return {"stage": STAGES[stage]}


def token_loss(
    stage: str,
    finetuning_type: str,
    adapter_name_or_path: str | Sequence[str] | None,
    use_dft_loss: bool,
    use_eaft_loss: bool,
    eaft_alpha: float,
    use_asft_loss: bool,
    asft_alpha: float,
    label_smoothing_factor: float,
    neftune_noise_alpha: float | None,
) -> Settings | NoEffect:
    """There, dft counts before eaft, and eaft before asft."""
    for_sft = {
        "use_dft_loss": use_dft_loss,
        "use_eaft_loss": use_eaft_loss,
        "use_asft_loss": use_asft_loss,
        "label_smoothing_factor": label_smoothing_factor,
        "neftune_noise_alpha": neftune_noise_alpha,
    }
    if stage != "sft":
        if wanted := [name for name, value in for_sft.items() if value]:
            raise Refusal(f"stage={stage} has none here", wanted[0])
        return NoEffect(f"is not read with stage={stage}")
    losses = ("dft", "eaft", "asft")
    loss = next((name for name in losses if for_sft[f"use_{name}_loss"]), "cross_entropy")
    if loss == "asft" and (finetuning_type != "lora" or adapter_name_or_path is not None):
        raise Refusal("asft needs a new LoRA adapter: its reference is the model without it", "use_asft_loss")
    return {
        "stage.loss": loss,
        **{"eaft": {"stage.eaft_alpha": float(eaft_alpha)}, "asft": {"stage.asft_alpha": float(asft_alpha)}}.get(loss, {}),
        "stage.label_smoothing": float(label_smoothing_factor),
        "stage.neftune_alpha": neftune_noise_alpha or None,
    }


def trained_turns(stage: str, train_on_prompt: bool, mask_history: bool) -> Settings | NoEffect:
    if stage != "sft":
        return NoEffect(f"is not read with stage={stage}")
    return {"data.train_on_prompt": train_on_prompt, "data.mask_history": mask_history}


def routers(stage: str, moe_aux_loss_coef: float | None) -> Settings | NoEffect:
    if stage in ("sft", "pt"):
        return {"stage.router_aux_loss_coef": moe_aux_loss_coef or None}
    if moe_aux_loss_coef:
        raise Refusal(f"stage={stage} has none here", "moe_aux_loss_coef")
    return NoEffect(f"is not read with stage={stage}")


def preference(
    stage: str,
    pref_loss: str,
    pref_beta: float,
    pref_ftx: float,
    pref_bco_weight: float,
    dpo_label_smoothing: float,
    simpo_gamma: float,
    ld_alpha: float | None,
    kto_chosen_weight: float,
    kto_rejected_weight: float,
) -> Settings | NoEffect:
    """With TRL 0.20 and later, LLaMA-Factory computes sigmoid for hinge and ipo too. Here they are what they are called."""
    beta = {"stage.beta": float(pref_beta)}
    if stage == "kto":
        return {
            **beta,
            "stage.desirable_weight": float(kto_chosen_weight),
            "stage.undesirable_weight": float(kto_rejected_weight),
            "stage.sft_weight": float(pref_ftx),
        }
    if stage != "dpo":
        return NoEffect(f"is not read with stage={stage}")
    if pref_loss in ("orpo", "simpo"):
        for_dpo = {"pref_ftx": pref_ftx, "pref_bco_weight": pref_bco_weight, "ld_alpha": ld_alpha}
        if unknown := [name for name, value in for_dpo.items() if value]:
            raise Refusal(f"{pref_loss} has none here", unknown[0])
        return beta if pref_loss == "orpo" else {**beta, "stage.gamma": float(simpo_gamma)}
    share = 1 / (1 + pref_bco_weight)
    return {
        **beta,
        "stage.loss": {pref_loss: share, "bco_pair": 1 - share} if pref_bco_weight else pref_loss,
        "stage.label_smoothing": float(dpo_label_smoothing),
        "stage.sft_weight": float(pref_ftx),
        "stage.ld_alpha": ld_alpha,
    }


def reference(
    stage: str,
    pref_loss: str,
    ref_model: str | None,
    ref_model_adapters: str | Sequence[str] | None,
    ref_model_quantization_bit: int | None,
) -> Settings | NoEffect:
    if stage != "kto" and not (stage == "dpo" and PAIR_STAGES.get(pref_loss) == "dpo"):
        return NoEffect("the stage has no reference")
    if ref_model is None:
        return {"stage.reference_model": None, "stage.reference_adapter": None}
    if ref_model_quantization_bit is not None:
        raise Refusal("a reference model is not quantized; leave it out", "ref_model_quantization_bit")
    adapters = [] if ref_model_adapters is None else _listed(ref_model_adapters)
    if len(adapters) > 1:
        raise Refusal("a reference has one adapter; merge the others with `export`", "ref_model_adapters")
    return {"stage.reference_model": ref_model, "stage.reference_adapter": adapters[0] if adapters else None}


# Data ----------------------------------------------------------------------------------------------------------------


def data_sets(
    dataset: str | Sequence[str] | None, dataset_dir: str, dataset_info: str | None, media_dir: str | None, stage: str, find: Find
) -> Settings:
    if dataset is None:
        raise Refusal("must name the data sets to train on", "dataset")
    names = _listed(dataset)
    if dataset_info is None and dataset_dir == "ONLINE":
        return _hub_data(names)
    path, here = _declaration(dataset_dir, dataset_info, find)
    if here:
        _check(path, names, stage, "dataset")
    return {"data": "alpaca", "data.path": None, "data.dataset_info": path, "data.names": names}


def held_out(
    eval_dataset: str | Sequence[str] | None,
    val_size: float,
    eval_strategy: str,
    dataset_dir: str,
    dataset_info: str | None,
    stage: str,
    find: Find,
) -> Settings:
    if eval_dataset is not None and val_size:
        raise Refusal("can't be combined with val_size", "eval_dataset")
    names = [] if eval_dataset is None else _listed(eval_dataset)
    if eval_strategy != "no" and not (val_size or names):
        raise Refusal("needs rows to evaluate on; set val_size or eval_dataset", "eval_strategy")
    if names and dataset_info is None and dataset_dir == "ONLINE":
        return {"data.eval_fraction": 0.0, "data.eval_path": {name: name for name in names}}
    if names:
        path, here = _declaration(dataset_dir, dataset_info, find)
        if here:
            _check(path, names, stage, "eval_dataset")
    if val_size > 1:  # so many rows
        return {"data.eval_fraction": 0.0, "data.eval_rows": int(val_size), "data.eval_names": names}
    return {"data.eval_fraction": float(val_size), "data.eval_names": names}


def _declaration(dataset_dir: str, dataset_info: str | None, find: Find) -> tuple[str, bool]:
    """The dataset_info.json of a run, as it can be written into an experiment, and whether it is here."""
    if dataset_info is None and dataset_dir.startswith("REMOTE:"):
        hub_id = dataset_dir.removeprefix("REMOTE:")
        raise Refusal(f"fetch {hub_id} to a folder and import with dataset_info=FOLDER", "dataset_dir")
    wanted = dataset_info or dataset_dir
    if not wanted.endswith(".json"):
        wanted = str(Path(wanted, "dataset_info.json"))
    found = find(wanted)
    if dataset_info is not None and found is None:
        raise Refusal(f"there is no {wanted}", "dataset_info")
    return found or wanted, found is not None


def _check(path: str, names: Sequence[str], stage: str, argument: str) -> None:
    """Check that the entries are there and are of the kind that the stage trains on."""
    try:
        entries = declarations.from_dataset_info(path, list(names), media_dir=None, ranked=stage in ("dpo", "rm"))
    except UserError as error:
        raise Refusal(str(error), argument) from None
    for entry in entries:
        columns: Any = entry.format
        if any(getattr(columns, name) is not None for name in ("images", "videos", "audios")):
            raise Refusal(f"{entry.name} has images, videos or audio, and training on them (vision) {LATER}", argument)
        if stage == "kto" and columns.label is None:
            raise Refusal(f"{entry.name} has no column kto_tag, which stage=kto needs", argument)


def _hub_data(names: Sequence[str]) -> Settings:
    """One data set of the hub, whose columns have LLaMA-Factory's names."""
    if len(names) > 1:
        raise Refusal(
            "several data sets of the hub need a dataset_info.json (hf_hub_url); import with dataset_info=FILE", "dataset"
        )
    absent = dict.fromkeys((f"data.format.{name}" for name in ("system", "history", "tools", "images", "videos", "audios")), None)
    return {"data": "alpaca", "data.path": names[0], "data.dataset_info": None, "data.names": [], **absent}


def packing(stage: str, packing: bool | None, neat_packing: bool) -> Settings:
    if stage not in ("sft", "pt"):
        return {"data.packing": False}
    return {"data.packing": bool(packing or neat_packing or (packing is None and stage == "pt"))}


def max_length(cutoff_len: int, stage: str, packing: bool | None) -> Settings:
    """And its way of cutting rows to it. Texts that are packed end to end are not cut."""
    if stage == "pt" and packing is not False:
        return {"data.max_length": cutoff_len}
    return {"data.max_length": cutoff_len, "data.overlong": "llamafactory"}


def streaming(streaming: bool, buffer_size: int, dataset: str | Sequence[str] | None, max_steps: int) -> Settings:
    if not streaming:
        return {"data.streaming": False}
    if max_steps <= 0:
        raise Refusal("needs max_steps", "streaming")
    if dataset is not None and len(_listed(dataset)) > 1:
        raise Refusal("several data sets can't be streamed; without streaming they are tokenized once, on all cores", "streaming")
    return {"data.streaming": True, "data.streaming_buffer_rows": buffer_size}


def template(
    stage: str,
    template: str | None,
    tool_format: str | None,
    default_system: str | None,
    enable_thinking: bool | None,
    preserve_thinking: bool,
) -> Settings | NoEffect:
    if stage == "pt":
        return NoEffect("plain text has no template")
    if template is not None and template not in named_templates.names():
        raise Refusal(f"there is no such template; there are {', '.join(named_templates.names())}", "template")
    if tool_format is not None and template is None:
        raise Refusal("needs template: a tokenizer's own template has its own format", "tool_format")
    return {
        "data.template": template,
        "data.tool_format": tool_format,
        "data.default_system": default_system,
        "data.enable_thinking": enable_thinking,
        "data.preserve_thinking": preserve_thinking,
    }


# Steps ---------------------------------------------------------------------------------------------------------------


def batch_sizes(
    per_device_train_batch_size: int, gradient_accumulation_steps: int, ray_num_workers: int, world_size: int | None
) -> Settings:
    workers = world_size or ray_num_workers
    return {
        "train.micro_batch_size": per_device_train_batch_size,
        "train.global_batch_size": per_device_train_batch_size * gradient_accumulation_steps * workers,
    }


def epochs(num_train_epochs: float, max_steps: int, streaming: bool) -> Settings:
    if max_steps > 0:
        # There, max_steps alone says how long a run is. An epoch has a step or more; a stream has no epochs.
        return {"train.epochs": 1 if streaming else max_steps, "train.max_steps": max_steps}
    if not num_train_epochs > 0:
        raise Refusal("must be above 0", "num_train_epochs")
    return {"train.epochs": float(num_train_epochs), "train.max_steps": None}


ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_npu_fused")


BNB_8BIT = {"adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
UNSET: dict[str, Settings] = {
    "sgd": {"optimizer": "sgd", "optimizer.momentum": 0.0},
    "adafactor": {"optimizer": "adafactor"},
    "lomo": {"optimizer": "lomo"},
    "adalomo": {"optimizer": "adalomo"},
}
"""Optimizers that read no adam_ argument."""
SWITCHED = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""The first that is on wins, over optim too."""


def optimizer(
    optim: str,
    use_galore: bool,
    use_apollo: bool,
    use_badam: bool,
    use_adam_mini: bool,
    use_muon: bool,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
) -> Settings:
    """transformers' SGD has no momentum. Its Adafactor has the schedule's rate, not one of its own. AdaLomo is Adafactor relative
    to the weights, a tensor at a time, and LOMO so much of SGD."""
    switches = (use_galore, use_apollo, use_badam, use_adam_mini, use_muon)
    switched = next((name.removeprefix("use_") for name, on in zip(SWITCHED, switches, strict=True) if on), None)
    if switched is None and optim in UNSET:
        return UNSET[optim]
    betas = {"optimizer.beta1": adam_beta1, "optimizer.beta2": adam_beta2}
    if switched is None and optim in ("lion", "lion_32bit"):
        return {"optimizer": "lion", **betas}
    chosen = switched or _adam_of(optim)
    return {"optimizer": chosen, **betas, "optimizer.eps": adam_epsilon}


def _adam_of(optim: str) -> str:
    if optim in ADAMW:
        return "adamw"
    if optim in BNB_8BIT:
        return BNB_8BIT[optim]
    if optim == "schedule_free_adamw":
        return "schedule_free"
    if "q_galore" in optim:
        raise Refusal(f"{optim} has no package whose state can be saved; there are galore and apollo_mini", "optim")
    if optim.startswith(("galore", "apollo")):
        raise Refusal(f"{optim} {LATER} with optim_target_modules; use use_galore or use_apollo", "optim")
    raise Refusal(
        f"{optim} {LATER}; there are adamw_torch, adamw_8bit, adafactor, lion_32bit, schedule_free_adamw and sgd", "optim"
    )


def galore(
    use_galore: bool,
    galore_target: str | list[str],
    galore_rank: int,
    galore_update_interval: int,
    galore_scale: float,
    galore_proj_type: str,
    galore_layerwise: bool,
) -> Settings:
    if not use_galore:
        return {}
    _only("galore_target", galore_target, ("all", ["all"]), "every matrix of the layers is projected")
    _only("galore_proj_type", galore_proj_type, ("std",), "the shorter side is projected, as std does")
    return {**_projected(galore_rank, galore_update_interval, galore_scale), "optimizer.layerwise": galore_layerwise}


def apollo(
    use_apollo: bool,
    apollo_target: str | list[str],
    apollo_rank: int,
    apollo_update_interval: int,
    apollo_scale: float,
    apollo_proj: str,
    apollo_proj_type: str,
    apollo_scale_type: str,
    apollo_layerwise: bool,
    apollo_scale_front: bool,
) -> Settings:
    if not use_apollo:
        return {}
    _only("apollo_target", apollo_target, ("all", ["all"]), "every matrix of the layers is projected")
    _only("apollo_proj", apollo_proj, ("random",), "projections are random")
    _only("apollo_proj_type", apollo_proj_type, ("std",), "the shorter side is projected, as std does")
    _only("apollo_scale_front", apollo_scale_front, (False,), "the scale comes after the limit of the norm's growth")
    own = {"optimizer.sizes": apollo_scale_type, "optimizer.layerwise": apollo_layerwise}
    return {**_projected(apollo_rank, apollo_update_interval, apollo_scale), **own}


def _projected(rank: int, update_every: int, scale: float) -> Settings:
    return {"optimizer.rank": rank, "optimizer.update_every": update_every, "optimizer.scale": float(scale)}


def badam(
    use_badam: bool, badam_mode: str, badam_start_block: int | None, badam_switch_mode: str, badam_switch_interval: int
) -> Settings:
    if not use_badam:
        return {}
    ratio = "blocks are layers; a random part of every matrix (ratio) saves no gradients, and no paper has measured it"
    _only("badam_mode", badam_mode, ("layer",), ratio)
    _only("badam_start_block", badam_start_block, (None,), "the order says which block is first")
    never = "blocks take turns; one that never changes is adapter=freeze with adapter.layers=[NUMBER]"
    _only("badam_switch_mode", badam_switch_mode, ("ascending", "descending", "random"), never)
    if badam_switch_interval < 1:
        raise Refusal(f"must be at least 1: {never}", "badam_switch_interval")
    return {"optimizer.switch_every": badam_switch_interval, "optimizer.order": badam_switch_mode}


def _only(argument: str, value: Any, taken: tuple[Any, ...], why: str) -> None:
    if value not in taken:
        raise Refusal(f"must be {str(taken[0]).lower()} here: {why}", argument)


def schedule(lr_scheduler_type: str, lr_scheduler_kwargs: Mapping[str, Any] | str | None, learning_rate: float) -> Settings:
    given = json.loads(lr_scheduler_kwargs) if isinstance(lr_scheduler_kwargs, str) else dict(lr_scheduler_kwargs or {})
    match lr_scheduler_type:
        case "linear":
            chosen: dict[str, Any] = {"schedule": "linear"}
        case "constant" | "constant_with_warmup":
            chosen = {"schedule": "constant"}
        case "cosine" | "cosine_with_restarts":
            once = 0.5 if lr_scheduler_type == "cosine" else 1
            if given.pop("num_cycles", once) != once:
                raise Refusal("several cycles are not here", "lr_scheduler_kwargs")
            chosen = {"schedule": "cosine", "schedule.floor": 0.0}
        case "cosine_with_min_lr":
            if "min_lr" not in given and "min_lr_rate" not in given:
                raise Refusal("must hold min_lr or min_lr_rate", "lr_scheduler_kwargs")
            floor = given.pop("min_lr") / learning_rate if "min_lr" in given else given.pop("min_lr_rate")
            chosen = {"schedule": "cosine", "schedule.floor": float(floor)}
        case "inverse_sqrt":
            chosen = {"schedule": "inverse_sqrt", "schedule.timescale": given.pop("timescale", None)}
        case "polynomial":
            power, lr_end = float(given.pop("power", 1.0)), float(given.pop("lr_end", 1e-7))
            chosen = {"schedule": "polynomial", "schedule.power": power, "schedule.lr_end": lr_end}
        case "warmup_stable_decay":
            floor = float(given.pop("min_lr_ratio", 0.0))
            chosen = {"schedule": "wsd", "schedule.decay_ratio": None, "schedule.floor": floor}
        case other:
            raise Refusal(f"the schedule {other} {LATER}", "lr_scheduler_type")
    if given:
        raise Refusal(f"{', '.join(given)} of {lr_scheduler_type} can't be set here", "lr_scheduler_kwargs")
    return chosen


def warmup(lr_scheduler_type: str, warmup_steps: float, warmup_ratio: float | None) -> Settings | NoEffect:
    if lr_scheduler_type == "constant":
        return {"schedule.warmup_ratio": 0.0, "schedule.warmup_steps": None}
    if warmup_steps and warmup_ratio:
        raise Refusal(
            "can't be combined with warmup_ratio: which of the two counts depends on the version of transformers", "warmup_steps"
        )
    if warmup_steps >= 1:
        return {"schedule.warmup_ratio": None, "schedule.warmup_steps": int(warmup_steps)}
    return {"schedule.warmup_ratio": float(warmup_ratio or warmup_steps), "schedule.warmup_steps": None}


# Computing -----------------------------------------------------------------------------------------------------------


def precision(bf16: bool, fp16: bool, pure_bf16: bool) -> Settings:
    if fp16 and (bf16 or pure_bf16):
        raise Refusal("can't be combined with bf16", "fp16")
    return {"train.precision": "bf16" if bf16 or pure_bf16 else "fp16" if fp16 else "auto"}


def activation_checkpointing(disable_gradient_checkpointing: bool, use_unsloth_gc: bool) -> Settings:
    """There, it is on unless it is disabled. `auto` takes it where the model would not fit without."""
    chosen = "offload" if use_unsloth_gc else "none" if disable_gradient_checkpointing else "auto"
    return {"train.activation_checkpointing": chosen}


def compiled(torch_compile: bool) -> Settings:
    return {"train.compile": True if torch_compile else "auto"}


SHIPPED: Mapping[str, Mapping[str, Any]] = {
    "ds_z0_config.json": {"zero_optimization": {"stage": 0}},
    "ds_z2_config.json": {"zero_optimization": {"stage": 2}},
    "ds_z2_offload_config.json": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "ds_z2_autotp_config.json": {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}},
    "ds_z3_config.json": {"zero_optimization": {"stage": 3}},
    "ds_z3_fp8_config.json": {"zero_optimization": {"stage": 3}},
    "ds_z3_offload_config.json": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
}
"""What matters in the files of examples/deepspeed of LLaMA-Factory, for where they are not at hand."""


def strategy(
    deepspeed: str | Mapping[str, Any] | None,
    fsdp: str | bool | Sequence[str] | None,
    fsdp_config: str | Mapping[str, Any] | None,
    find: Find,
) -> Settings:
    if deepspeed and fsdp:
        raise Refusal("can't be combined with deepspeed", "fsdp")
    if deepspeed:
        return _zero(_read_json(deepspeed, "deepspeed", find))
    if fsdp:
        config = {} if fsdp_config is None else _read_json(fsdp_config, "fsdp_config", find)
        return _fsdp("full_shard" if fsdp is True else fsdp, config)
    return {"strategy": "ddp"}


def _zero(config: Mapping[str, Any]) -> Settings:
    if sections := [name for name in ("optimizer", "scheduler") if name in config]:
        raise Refusal(f"its section {sections[0]} would override the arguments; leave it out", "deepspeed")
    if int(config.get("tensor_parallel", {}).get("autotp_size", 1)) > 1:
        raise Refusal(f"tensor parallelism {LATER}", "deepspeed")
    zero = config.get("zero_optimization", {})
    level = int(zero.get("stage", 0))
    devices = {str((zero.get(part) or {}).get("device", "none")) for part in ("offload_optimizer", "offload_param")}
    if "nvme" in devices:
        raise Refusal("offloading to disks (nvme) is not here", "deepspeed")
    if not level:
        return {"strategy": "ddp"}
    return {"strategy": f"zero{level}", "strategy.offload": "cpu" in devices}


def _fsdp(fsdp: str | Sequence[str], config: Mapping[str, Any]) -> Settings:
    options = _listed(fsdp, separator=r"[\s,]+")
    if hybrid := [option for option in options if option.startswith("hybrid")]:
        raise Refusal(f"{hybrid[0]}: say full_shard here and set strategy.shard_workers to the GPUs of a node", "fsdp")
    if "no_shard" in options:
        return {"strategy": "ddp"}
    said = {key.removeprefix("fsdp_"): str(value).lower() for key, value in config.items()}
    kept = "shard_grad_op" in options or said.get("reshard_after_forward") in ("false", "shard_grad_op")
    offload = "offload" in options or said.get("offload_params") == "true"
    return {"strategy": "fsdp", "strategy.reshard": "grad_only" if kept else "full", "strategy.offload": offload}


def _read_json(value: str | Mapping[str, Any], argument: str, find: Find) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    found = find(value)
    if found is None:
        if Path(value).name not in SHIPPED:
            raise Refusal("there is no such file", argument)
        return SHIPPED[Path(value).name]
    try:
        read = json.loads(Path(found).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"can't be read ({error})", argument) from None
    if not isinstance(read, dict):
        raise Refusal("must hold a JSON object", argument)
    return read


# Evaluation, checkpoints, reports ------------------------------------------------------------------------------------


def evaluation(eval_strategy: str, eval_steps: float | None, logging_steps: float) -> Settings:
    """There, every logging_steps where eval_steps is not given."""
    if eval_strategy != "steps":
        return {"train.eval_every_steps": None}
    return {"train.eval_every_steps": _whole(logging_steps if eval_steps is None else eval_steps, "eval_steps")}


def checkpoints(save_strategy: str, save_steps: float, save_total_limit: int | None) -> Settings:
    if save_strategy == "best":
        raise Refusal("set load_best_model_at_end, which keeps the best state too", "save_strategy")
    settings: dict[str, Any] = {"checkpoint.every_steps": _whole(save_steps, "save_steps") if save_strategy == "steps" else None}
    if save_total_limit is not None:
        settings["checkpoint.keep"] = save_total_limit
    return settings


def best(load_best_model_at_end: bool, metric_for_best_model: str | None, greater_is_better: bool | None) -> Settings:
    if not load_best_model_at_end:
        return {"checkpoint.final": "last"}
    if metric_for_best_model not in (None, "loss", "eval_loss"):
        raise Refusal("the best state is the one with the lowest eval loss", "metric_for_best_model")
    if greater_is_better:
        raise Refusal("the best state is the one with the lowest eval loss", "greater_is_better")
    return {"checkpoint.final": "best"}


def tracking(
    report_to: str | Sequence[str] | None,
    run_name: str | None,
    project: str,
    use_swanlab: bool,
    swanlab_project: str,
    swanlab_run_name: str | None,
) -> Settings:
    wanted = {name for name in ([] if report_to is None else _listed(report_to)) if name != "none"}
    if use_swanlab:
        wanted.add("swanlab")
    if len(wanted) > 1:
        raise Refusal(f"one tracker at a time; name one of {', '.join(sorted(wanted))}", "report_to")
    tracker = next(iter(wanted), "none")
    if tracker in ("none", "tensorboard"):
        return {"tracking": tracker}
    projects = {"wandb": "llamafactory", "mlflow": "llamafactory", "swanlab": swanlab_project, "trackio": project}
    if tracker not in projects:
        raise Refusal(f"{tracker} is not supported; there are tensorboard, {', '.join(projects)}", "report_to")
    name = swanlab_run_name if tracker == "swanlab" and swanlab_run_name else run_name
    return {"tracking": tracker, "tracking.project": projects[tracker], "tracking.run": name}


def output(output_dir: str | None) -> Settings:
    return {} if output_dir is None else {"output_dir": output_dir}


def _whole(steps: float, argument: str) -> int:
    try:
        return whole_steps(steps)
    except Refusal as refusal:
        raise Refusal(refusal.why, argument) from None


def _listed(value: str | Sequence[Any], separator: str = ",") -> list[Any]:
    """LLaMA-Factory takes lists as lists or as one text with commas."""
    if not isinstance(value, str):
        return list(value)
    return [part.strip() for part in re.split(separator, value) if part.strip()]
