"""The training files that come with LLaMA-Factory, by their arguments: each becomes an experiment or is refused by its word."""

from __future__ import annotations

import pytest

from raytune_llm import api, load_config
from raytune_llm.errors import ConfigError

LLAMA = {"model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "template": "llama3"}
QWEN = {"model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "trust_remote_code": True, "template": "qwen3_nothink"}
METHOD = {"do_train": True, "stage": "sft", "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
DATA = {
    "dataset": "identity,alpaca_en_demo", "cutoff_len": 2048, "max_samples": 1000, "preprocessing_num_workers": 16,
    "dataloader_num_workers": 4, "overwrite_cache": True,
}  # fmt: skip
OUTPUT = {
    "output_dir": "saves/x", "logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True,
    "save_only_model": False, "report_to": "none",
}  # fmt: skip
TRAIN = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 180000000, "resume_from_checkpoint": None,
}  # fmt: skip
EVAL = {"val_size": 0.1, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500}
SFT = {**METHOD, **DATA, **OUTPUT, **TRAIN}
LORA = {**QWEN, **SFT}
FULL = {**QWEN, **SFT, "finetuning_type": "full", "learning_rate": 1e-5}
PAIRS = {**LORA, "stage": "dpo", "dataset": "dpo_en_demo", "learning_rate": 5e-6, "pref_beta": 0.1}
ZERO3 = "examples/deepspeed/ds_z3_config.json"

CONVERTED = {
    "lora/sft": (LORA, {"stage.name": "sft", "adapter.alpha": 16.0, "train.global_batch_size": 8, "train.epochs": 3}),
    "lora/sft_with_eval": ({**LLAMA, **SFT, **EVAL}, {"data.eval_fraction": 0.1, "train.eval_every_steps": 500}),
    "lora/sft_with_eval_dataset": ({**LORA, "eval_dataset": "alpaca_en_demo"}, {"data.eval_names": ["alpaca_en_demo"]}),
    "lora/sft_ds0": ({**LORA, "deepspeed": "examples/deepspeed/ds_z0_config.json"}, {"strategy.name": "ddp"}),
    "lora/sft_ds3": ({**LORA, "deepspeed": ZERO3}, {"strategy.stage": 3, "strategy.offload": False}),
    "lora/sft_ray": (
        {**LORA, "ray_num_workers": 4, "ray_init_kwargs": {"runtime_env": {"pip": ["emoji"]}}},
        {"train.global_batch_size": 32},
    ),
    "extras/oft": (
        {**LORA, "finetuning_type": "oft", "oft_block_size": 16, "oft_target": "q_proj,v_proj", "module_dropout": 0.1},
        {"adapter.name": "oft", "adapter.block_size": 16, "adapter.targets": ["q_proj", "v_proj"], "adapter.dropout": 0.1},
    ),
    "extras/oft by lora_target": (
        {**LORA, "finetuning_type": "oft", "lora_target": "q_proj,v_proj"},
        {"adapter.name": "oft", "adapter.targets": ["q_proj", "v_proj"]},
    ),
    "extras/oft_rank": (
        {**LORA, "finetuning_type": "oft", "oft_rank": 8, "oft_block_size": 0},
        {"adapter.name": "oft", "adapter.blocks": 8, "adapter.block_size": None},
    ),
    "extras/longlora": (
        {**LORA, "shift_attn": True, "cutoff_len": 16384, "rope_scaling": "yarn"},
        {"model.shift_attn_tokens": 4096, "model.rope_scaling": "yarn", "model.positions": 16384},
    ),
    "extras/liger": ({**LORA, "enable_liger_kernel": True}, {"model.liger_kernel": False}),
    "extras/reference": (
        {**PAIRS, "ref_model": "org/other", "ref_model_adapters": "saves/other"},
        {"stage.reference_model": "org/other", "stage.reference_adapter": "saves/other"},
    ),
    "extras/dora": ({**LORA, "use_dora": True}, {"adapter.dora": True, "adapter.rank": 8, "adapter.alpha": 16.0}),
    "extras/every_variant": (
        {**LORA, "use_dora": True, "use_rslora": True, "pissa_init": True, "loraplus_lr_ratio": 8.0},
        {"adapter.name": "pissa", "adapter.dora": True, "adapter.rslora": True, "adapter.lr_ratio": 8.0},
    ),
    "extras/rslora_dora": (
        {**LORA, "use_rslora": True, "use_dora": True, "quantization_bit": 4},
        {"adapter.name": "lora", "adapter.dora": True, "adapter.rslora": True, "quantization.name": "bnb_nf4"},
    ),
    "extras/apollo_layerwise": (
        {**FULL, "use_apollo": True, "apollo_rank": 128, "apollo_layerwise": True, "gradient_accumulation_steps": 1},
        {"optimizer.name": "apollo", "optimizer.rank": 128, "optimizer.layerwise": True, "train.max_grad_norm": None},
    ),
    "extras/galore_layerwise": (
        {**FULL, "use_galore": True, "galore_layerwise": True, "gradient_accumulation_steps": 1},
        {"optimizer.name": "galore", "optimizer.layerwise": True, "train.max_grad_norm": None},
    ),
    "extras/lomo": (
        {**FULL, "optim": "lomo", "gradient_accumulation_steps": 1, "deepspeed": None},
        {"optimizer.name": "sgd", "optimizer.momentum": 0.0, "optimizer.layerwise": True, "train.max_grad_norm": None},
    ),
    "extras/adalomo": (
        {**FULL, "optim": "adalomo", "gradient_accumulation_steps": 1},
        {"optimizer.name": "adafactor", "optimizer.relative_to_weights": True, "optimizer.layerwise": True},
    ),
    "qlora/8bit": ({**LORA, "quantization_bit": 8}, {"quantization.name": "bnb_int8"}),
    "qlora/fp4": ({**LORA, "quantization_bit": 4, "quantization_type": "fp4"}, {"quantization.name": "bnb_fp4"}),
    "qlora/hqq": ({**LORA, "quantization_bit": 4, "quantization_method": "hqq"}, {"quantization.name": "hqq"}),
    "extras/pissa": (
        {**LORA, "pissa_init": True, "pissa_iter": -1, "pissa_convert": True},
        {"adapter.name": "pissa", "adapter.svd_iterations": None, "adapter.alpha": 16.0},
    ),
    "extras/loraplus": (
        {**LORA, "loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-5, "learning_rate": 1e-4},
        {"adapter.name": "lora", "adapter.lr_ratio": 16.0, "adapter.embedding_lr_ratio": 0.1},
    ),
    "extras/freeze": (
        {**FULL, "finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_extra_modules": "embed_tokens,norm"},
        {
            "adapter.name": "freeze",
            "adapter.first_layers": 3,
            "adapter.last_layers": None,
            "adapter.modules": "all",
            "adapter.extra_modules": ["embed_tokens", "norm"],
        },
    ),
    "extras/modules_to_save": (
        {**LORA, "additional_target": "embed_tokens,lm_head"},
        {"adapter.modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "extras/stacked": (
        {**LORA, "adapter_name_or_path": "saves/one,saves/two"},
        {"model.merged_adapters": ["saves/one"], "adapter.path": "saves/two"},
    ),
    "extras/new_on_merged": (
        {**LORA, "adapter_name_or_path": "saves/one,saves/two", "create_new_adapter": True},
        {"model.merged_adapters": ["saves/one", "saves/two"], "adapter.path": None},
    ),
    "extras/rslora": ({**LORA, "use_rslora": True, "lora_rank": 32}, {"adapter.rslora": True, "adapter.rank": 32}),
    "lora/preprocess": ({**LORA, "tokenized_path": "saves/dataset"}, {"data.max_samples": 1000}),
    "lora/pretrain": ({**LORA, "stage": "pt", "dataset": "c4_demo"}, {"stage.name": "pretrain", "data.packing": True}),
    "lora/dpo": (
        {**PAIRS, "pref_loss": "sigmoid"},
        {"stage.name": "dpo", "stage.loss": "sigmoid", "stage.beta": 0.1, "data.packing": False, "optimizer.lr": 5e-6},
    ),
    "lora/orpo": ({**PAIRS, "pref_loss": "orpo"}, {"stage.name": "orpo", "stage.beta": 0.1}),
    "lora/simpo": ({**PAIRS, "pref_loss": "simpo", "simpo_gamma": 0.7}, {"stage.name": "simpo", "stage.gamma": 0.7}),
    "lora/reward": ({**LORA, "stage": "rm", "dataset": "dpo_en_demo"}, {"stage.name": "reward", "data.packing": False}),
    "lora/kto": (
        {**LORA, "stage": "kto", "dataset": "kto_en_demo", "pref_beta": 0.1, "kto_rejected_weight": 1.2},
        {"stage.name": "kto", "stage.beta": 0.1, "stage.desirable_weight": 1.0, "stage.undesirable_weight": 1.2},
    ),
    "lora/streaming": (
        {**LORA, "dataset": "identity", "streaming": True, "max_steps": 100, "buffer_size": 64, "max_samples": None},
        {"data.streaming": True, "data.streaming_buffer_rows": 64, "train.max_steps": 100, "train.epochs": 1},
    ),
    "qlora/otfq": (
        {**LORA, "quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True},
        {"quantization.name": "bnb_nf4"},
    ),
    "full/sft": ({**FULL, "deepspeed": ZERO3}, {"adapter.name": "none", "strategy.stage": 3}),
    "full/sft_offload": (
        {**FULL, "deepspeed": "examples/deepspeed/ds_z3_offload_config.json"},
        {"strategy.stage": 3, "strategy.offload": True},
    ),
    "full/sft_fsdp": ({**FULL, "fsdp": "full_shard auto_wrap offload"}, {"strategy.name": "fsdp", "strategy.offload": True}),
    "extras/fsdp_qlora": (
        {**LLAMA, **SFT, **EVAL, "quantization_bit": 4, "lora_target": "q_proj,v_proj", "fp16": True, "bf16": False},
        {"adapter.targets": ["q_proj", "v_proj"], "train.precision": "fp16"},
    ),
    "extras/dft": ({**FULL, "use_dft_loss": True}, {"stage.loss": "dft"}),
    "extras/eaft": ({**FULL, "use_eaft_loss": True, "eaft_alpha": 2.0}, {"stage.loss": "eaft", "stage.eaft_alpha": 2.0}),
    "extras/asft_lora": ({**LORA, "use_asft_loss": True}, {"stage.loss": "asft", "stage.asft_alpha": 0.1}),
    "extras/muon": (
        {**FULL, "use_muon": True, "adam_beta2": 0.95},
        {"optimizer.name": "muon", "optimizer.momentum": 0.95, "optimizer.beta2": 0.95, "optimizer.weight_decay": 0.0},
    ),
    "extras/adam_mini": (
        {**FULL, "use_adam_mini": True, "deepspeed": None},
        {"optimizer.name": "adam_mini", "optimizer.eps": 1e-8},
    ),
    "extras/badam": (
        {**FULL, "use_badam": True, "badam_mode": "layer", "badam_verbose": 2, "deepspeed": None},
        {"optimizer.name": "badam", "optimizer.switch_every": 50, "optimizer.order": "ascending"},
    ),
    "extras/galore": (
        {**FULL, "use_galore": True, "galore_rank": 128, "galore_scale": 2.0},
        {"optimizer.name": "galore", "optimizer.rank": 128, "optimizer.scale": 2.0},
    ),
    "extras/fp8": (
        {**FULL, "fp8": True, "fp8_backend": "te", "fp8_enable_fsdp_float8_all_gather": True},
        {"adapter.name": "none", "quantization.name": "fp8", "quantization.skip_modules": []},
    ),
    "extras/neftune": ({**LORA, "neftune_noise_alpha": 5}, {"stage.neftune_alpha": 5.0, "stage.loss": "cross_entropy"}),
    "extras/new_tokens": (
        {**LORA, "add_tokens": "<a>,<b>", "add_special_tokens": ["<c>"], "resize_vocab": True},
        {"model.new_tokens": ["<a>", "<b>", "<c>"], "model.resize_vocab": True},
    ),
    "extras/new_tokens_described": (
        {**LORA, "new_special_tokens_config": {"<c>": "a lamp"}, "init_special_tokens": "desc_init", "add_tokens": "<a>"},
        {"model.new_tokens": {"<a>": "<a>", "<c>": "a lamp"}},
    ),
    "extras/moe": ({**LORA, "moe_aux_loss_coef": 0.001}, {"stage.router_aux_loss_coef": 0.001}),
    "extras/neat_packing": ({**LORA, "neat_packing": True, "flash_attn": "fa2"}, {"data.packing": True}),
    "qlora/gptq": (
        {**LORA, "model_name_or_path": "TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ"},
        {"model.path": "TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ", "quantization.name": "none"},
    ),
    "qlora/awq": (
        {**LORA, "model_name_or_path": "TechxGenus/Meta-Llama-3-8B-Instruct-AWQ", "quantization_bit": 4},
        {"model.path": "TechxGenus/Meta-Llama-3-8B-Instruct-AWQ", "quantization.name": "none"},
    ),
    "qlora/aqlm": (
        {**LORA, "model_name_or_path": "ISTA-DASLab/Meta-Llama-3-8B-Instruct-AQLM-2Bit-1x16"},
        {"model.path": "ISTA-DASLab/Meta-Llama-3-8B-Instruct-AQLM-2Bit-1x16", "quantization.name": "none"},
    ),
}

REFUSED = {
    "lora/ppo": ({**LORA, "stage": "ppo", "reward_model": "saves/reward", "ppo_epochs": 2}, "ppo"),
    "lora/sft_remote": ({**LORA, "dataset_dir": "REMOTE:llamafactory/demo_data"}, "llamafactory/demo_data"),
    "lora/vision": ({**LORA, "dataset": "mllm_demo,identity"}, "vision"),
    "lora/vision_pixels": ({**LORA, "image_max_pixels": 262144, "video_max_pixels": 16384}, "vision"),
    "lora/kt": ({**LORA, "use_kt": True, "kt_weight_path": "experts"}, "ktransformers"),
    "lora/predict": ({**LORA, "do_train": False, "do_predict": True, "predict_with_generate": True}, "predict"),
    "qlora/3bit": ({**LORA, "quantization_bit": 3}, "3 bits"),
    "qlora/hqq_8bit": ({**LORA, "quantization_bit": 8, "quantization_method": "hqq"}, "hqq to 8 bits"),
    "qlora/eetq": ({**LORA, "quantization_bit": 8, "quantization_method": "eetq"}, "eetq"),
    "full/autotp": ({**FULL, "deepspeed": "examples/deepspeed/ds_z2_autotp_config.json"}, "tensor parallelism"),
    "extras/asft": ({**FULL, "use_asft_loss": True, "asft_alpha": 0.1}, "asft needs a new LoRA adapter"),
    "extras/fp8": ({**FULL, "fp8": True, "deepspeed": ZERO3}, "DeepSpeed casts"),
    "extras/fp8_and_4bit": ({**LORA, "fp8": True, "quantization_bit": 4}, "few bits"),
    "extras/llama_pro": (
        {**FULL, "finetuning_type": "freeze", "use_llama_pro": True, "freeze_trainable_layers": 8},
        "config.json",
    ),
    "extras/freeze_nothing": ({**FULL, "finetuning_type": "freeze", "freeze_trainable_layers": 0}, "freeze_trainable_layers"),
    "extras/mod": ({**FULL, "mixture_of_depths": "convert"}, "mixture_of_depths"),
    "extras/oft of two minds": (
        {**LORA, "finetuning_type": "oft", "lora_target": "q_proj", "oft_target": "v_proj"},
        "names other layers than lora_target",
    ),
    "extras/oft_rank": ({**LORA, "finetuning_type": "oft", "oft_rank": 8}, "PEFT takes one of oft_rank and oft_block_size"),
    "extras/longlora_dpo": ({**PAIRS, "shift_attn": True}, "whose reference attends to all"),
    "extras/reference_4bit": ({**PAIRS, "ref_model": "org/other", "ref_model_quantization_bit": 4}, "not quantized"),
    "extras/badam_ratio": ({**FULL, "use_badam": True, "badam_mode": "ratio"}, "a random part of every matrix"),
    "extras/badam_fixed": ({**FULL, "use_badam": True, "badam_switch_mode": "fixed"}, "adapter=freeze with adapter.layers"),
    "extras/new_tokens_noise": (
        {**LORA, "new_special_tokens_config": {"<c>": "a lamp"}, "init_special_tokens": "desc_init_w_noise"},
        "noise is not added",
    ),
    "extras/new_tokens_file": ({**LORA, "new_special_tokens_config": "nothing.yaml"}, "no such file"),
    "extras/pissa_continued": ({**LORA, "pissa_init": True, "adapter_name_or_path": "saves/one"}, "new adapter"),
    "merge_lora": ({**LORA, "export_dir": "output", "export_size": 5, "export_device": "cpu"}, "export"),
}


def imported(training_file, arguments, *overrides):
    api.import_(load_config("import", [f"file={training_file(**arguments)}", "name=x", *overrides]))
    return load_config("train", ["+experiment=x"], config_dir="conf")


def value(run, path):
    for part in path.split("."):
        run = getattr(run, part)
    return run


@pytest.mark.parametrize("example", CONVERTED)
def test_an_example_becomes_an_experiment(training_file, example):
    arguments, expected = CONVERTED[example]
    run = imported(training_file, arguments)
    assert {path: value(run, path) for path in expected} == expected


@pytest.mark.parametrize("example", REFUSED)
def test_an_example_is_refused_by_the_right_word(training_file, factory, example):
    arguments, word = REFUSED[example]
    with pytest.raises(ConfigError) as error:
        imported(training_file, arguments)
    assert word in str(error.value)
    assert not (factory / "conf").exists()
