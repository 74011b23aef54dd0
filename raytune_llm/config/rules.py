"""Rules between sections of a run. Each function is named after its rule and raises ConfigError if it is broken."""

from __future__ import annotations

import difflib
from typing import Any

from raytune_llm.config.adapter import AdapterConfig
from raytune_llm.config.checkpoint import CheckpointConfig
from raytune_llm.config.data import DataConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.resources import ResourcesConfig, uses_ray, worker_counts
from raytune_llm.config.schedule import ScheduleConfig
from raytune_llm.config.stage import StageConfig
from raytune_llm.config.strategy import StrategyConfig
from raytune_llm.config.train import LoopConfig
from raytune_llm.config.tune import EVALUATIONS, EXACT_MATCH, TuneConfig, known_at_end
from raytune_llm.errors import ConfigError


def model_or_run_is_given(model: ModelConfig, setting: str, folder: str | None) -> None:
    if folder is None:
        model_is_given(model)
    elif model.path is not None or model.config:
        fix = "Leave one of them out: a run says what model it trained."
        raise ConfigError("model", f"can't be combined with {setting}", got=model.path or model.config, fix=fix)


def data_are_not_trained_on(data: DataConfig) -> None:
    """Refuses settings of `data` that only training reads."""
    for setting, given in (
        ("streaming", data.streaming),
        ("eval_path", data.eval_path),
        ("eval_split", data.eval_split),
        ("eval_names", data.eval_names),
        ("eval_fraction", data.eval_fraction),
        ("eval_rows", data.eval_rows),
        ("mix_epochs", data.mix_epochs),
        ("mix", data.mix != "concat"),
        ("train_on_prompt", data.train_on_prompt),
        ("mask_history", data.mask_history),
    ):
        if given:
            rule = "is for training: every row of data.path is read here"
            raise ConfigError(f"data.{setting}", rule, got=getattr(data, setting), fix="Leave it out.")


def name_is_a_name(name: str) -> None:
    """The name becomes a folder, and later the name of a served model."""
    if not name.strip() or "/" in name or "\\" in name or name in (".", ".."):
        raise ConfigError(
            "name",
            "must be a name without slashes, since output_dir ends with it",
            got=name,
            fix="Set output_dir for another place.",
        )


def batch_sizes_fit(data: DataConfig, resources: ResourcesConfig, train: LoopConfig) -> None:
    """Checks what is known before the run. runs/ray_group.py checks again when the number of workers is known."""
    workers = resources.num_workers
    if isinstance(workers, list):
        _group_can_change(train, data, workers)
    train.micro_batches(workers if isinstance(workers, int) else 1)


def _group_can_change(train: LoopConfig, data: DataConfig, workers: list[int]) -> None:
    fewest, most = workers
    if fewest >= most:
        fix = "For example, resources.num_workers=[2,8]."
        raise ConfigError("resources.num_workers", "must be a range [fewest,most] with fewest < most", got=workers, fix=fix)
    if data.streaming:
        fix = "Set one number, or data.streaming=false."
        raise ConfigError("resources.num_workers", "can't be a range with data.streaming=true", got=workers, fix=fix)
    micro, total = train.micro_batch_size, train.global_batch_size
    for count in (fewest, most):
        if total % (micro * count):
            fits = worker_counts([1, max(most, total // micro)], total // micro) if total % micro == 0 else []
            raise ConfigError(
                "resources.num_workers",
                f"must begin and end with numbers of workers that train.global_batch_size={total} can be divided among, "
                f"at train.micro_batch_size={micro}",
                got=workers,
                fix=f"Choose two of {', '.join(map(str, fits))}." if fits else "Change train.global_batch_size.",
            )


def trials_are_judged(
    data: DataConfig,
    resources: ResourcesConfig,
    stage: StageConfig,
    train: LoopConfig,
    tune: TuneConfig,
    *,
    needs_evaluations: bool,
) -> None:
    if not uses_ray(resources) and (tune.max_concurrent or 1) > 1 and tune.share_base is not True:
        fix = "Set resources=local, or tune.share_base=true."
        raise ConfigError(
            "tune.max_concurrent", "must be 1 with resources=inline, which is one process", got=tune.max_concurrent, fix=fix
        )
    if train.pause_at is not None:
        rule = "is for a run by itself: a sweep's trials wait where tune.pause_at says"
        raise ConfigError("train.pause_at", rule, got=train.pause_at, fix=f"Set tune.pause_at={train.pause_at}.")
    for metric in tune.metrics:
        if metric.startswith(EVALUATIONS) and not data.evaluates:
            fix = "Set data.eval_fraction (say 0.1) or data.eval_path."
            raise ConfigError("tune.metric", "needs held-out rows", got=metric, fix=fix)
        if metric.startswith(EVALUATIONS) and (fix := _unreported(metric, data, stage, train)) is not None:
            raise ConfigError("tune.metric", f"must be a metric that stage={stage.name} reports", got=metric, fix=fix)
        if metric == EXACT_MATCH and not train.exact_match_rows:
            raise ConfigError(
                "tune.metric", "needs train.exact_match_rows above 0", got=metric, fix="Say, train.exact_match_rows=100."
            )
        if not metric.startswith(EVALUATIONS) and not known_at_end(metric):
            fix = "Say, tune.metric=eval_loss, exact_match or module:function."
            raise ConfigError("tune.metric", "must be a metric of an evaluation or of a trial's end", got=metric, fix=fix)
    known = tune.says_where_to_evaluate and not needs_evaluations
    if tune.compares and not known and not train.eval_at and train.eval_every_steps is None and train.epochs <= 1:
        raise ConfigError(
            "train.eval_every_steps",
            f"must be given where tune.scheduler={tune.scheduler}: trials are compared at their evaluations, and one "
            "at the end is too late",
            got="null",
            fix="Say, a tenth of the steps.",
        )


def trials_are_judged_after_the_warm_up(schedule: ScheduleConfig, train: LoopConfig, tune: TuneConfig) -> None:
    """During the warm-up, no trial has trained at its own learning rate yet."""
    part = schedule.warmup_ratio or 0.0
    if schedule.warmup_steps and train.max_steps is not None:
        part = schedule.warmup_steps / train.max_steps
    if tune.stops_early and tune.grace < part:
        rule = f"must be at least the fraction of the steps in which the learning rate warms up, {part:g}"
        fix = "Raise it, or shorten the warm-up (schedule.warmup_ratio or warmup_steps)."
        raise ConfigError("tune.grace", rule, got=tune.grace, fix=fix)


def held_out_rows_exist_where_they_are_used(data: DataConfig, checkpoint: CheckpointConfig, train: LoopConfig) -> None:
    if data.evaluates:
        return
    users = {
        "train.eval_every_steps": train.eval_every_steps,
        "train.eval_at": train.eval_at,
        "train.early_stopping": train.early_stopping,
        "train.exact_match_rows": train.exact_match_rows or None,
        "train.sample_rows": train.sample_rows or None,
        "train.eval_tasks": train.eval_tasks or None,
        "checkpoint.final": checkpoint.final if checkpoint.keeps_best else None,
    }
    for setting, value in users.items():
        if value is not None:
            raise ConfigError(
                setting,
                "needs held-out rows",
                got=value,
                fix="Set data.eval_fraction (say 0.1), data.eval_rows or data.eval_path.",
            )


def runs_stop_by_a_figure_that_is_reported(data: DataConfig, stage: StageConfig, train: LoopConfig) -> None:
    metric = train.early_stopping_metric
    if data.evaluates and (fix := _unreported(metric, data, stage, train)) is not None:
        raise ConfigError("train.early_stopping_metric", "must be a metric that evaluations report", got=metric, fix=fix)


def _unreported(metric: str, data: DataConfig, stage: StageConfig, train: LoopConfig) -> str | None:
    """The fix for a metric that no evaluation reports; None if the metric is, or may be, reported. Metrics of eval_tasks are not
    known beforehand."""
    known = [f"{EVALUATIONS}{figure}" for figure in stage.figures]
    if metric in known or (train.eval_tasks and metric.startswith(EVALUATIONS)):
        return None
    if (
        data.names_held_out
        and metric.startswith(EVALUATIONS)
        and metric.endswith(tuple(f"_{figure}" for figure in stage.figures))
    ):
        return None
    near = difflib.get_close_matches(metric, known, n=1)
    return f"Did you mean {near[0]}?" if near else f"There are: {', '.join(known)}."


def model_is_given(model: ModelConfig) -> None:
    if model.path is not None:
        return
    if model.weights == "pretrained":
        raise ConfigError(
            "model.path",
            "must name a folder or a hub id if model.weights=pretrained",
            got="null",
            fix="Set model.path, choose another model=..., or set model.weights=random with model.config.",
        )
    if "model_type" not in model.config:
        raise ConfigError(
            "model.config",
            "must hold model_type if model.path is null",
            got=model.config,
            fix="For example, {model_type: llama}.",
        )
    if model.tokenizer is None:
        raise ConfigError("model.tokenizer", "must be given if model.path is null", fix="For example, model.tokenizer=bytes.")


def data_are_given(data: DataConfig) -> None:
    if data.path is None and data.dataset_info is None:
        raise ConfigError("data.path", "must name a file, a folder or a hub data set", fix="For example, data.path=rows.jsonl.")


def streams_know_what_they_need(data: DataConfig, stage: StageConfig, checkpoint: CheckpointConfig, train: LoopConfig) -> None:
    """The length of a stream is known only at its end, so nothing may depend on its length or on all of its rows."""
    if not data.streaming:
        return
    needed = {"train.max_steps": train.max_steps, "checkpoint.every_steps": checkpoint.every_steps}
    for setting, value in needed.items():
        if value is None:
            raise ConfigError(
                setting,
                "must be given if data.streaming=true: the end of an epoch is not known beforehand",
                got="null",
                fix=f"For example, {setting}=1000, or set data.streaming=false.",
            )
    refused = {
        "train.epochs": (train.epochs, train.epochs != 1, "Leave it at 1: train.max_steps says how long."),
        "data.eval_fraction": (data.eval_fraction, data.eval_fraction, "Set data.eval_path or data.eval_names."),
        "data.eval_rows": (data.eval_rows, data.eval_rows, "Set data.eval_path or data.eval_names."),
        "data.names": (data.names, len(data.names) > 1, "Use one data set, or set data.streaming=false."),
        "stage.reference": (
            "precomputed",
            stage.reference == "precomputed",
            "Set stage.reference=online, since a pass over all rows comes first, or data.streaming=false.",
        ),
        "data.mix_epochs": (data.mix_epochs, data.mix_epochs, "Remove it, or set data.streaming=false."),
        "data.cache": (
            data.cache,
            "://" in data.cache,
            "Name a folder that all nodes share, since workers read shards while they are written, or set data.streaming=false.",
        ),
    }
    for setting, (value, given, fix) in refused.items():
        if given:
            raise ConfigError(setting, "can't be combined with data.streaming=true", got=value, fix=fix)


def sharding_has_workers(strategy: StrategyConfig, resources: ResourcesConfig) -> None:
    if not uses_ray(resources) and strategy.shards:
        raise ConfigError(
            "strategy",
            "must be ddp if resources=inline, which is one process",
            got=strategy.option,
            fix="Set resources=local.",
        )


def anchored_policies_have_a_new_adapter(stage: StageConfig, adapter: AdapterConfig) -> None:
    if stage.anchored and not adapter.starts_at_base:
        raise ConfigError(
            "stage.loss",
            "can be asft with a new adapter only (adapter=lora adapter.path=null): its reference is the model without it",
            got="asft",
            fix="Set stage.loss=dft, or merge the existing adapter into the model.",
        )


def adapters_are_drawn(adapter: AdapterConfig, train: LoopConfig) -> None:
    seed = train.adapter_seed
    if seed is not None and adapter.trains_base:
        raise ConfigError("train.adapter_seed", "is for a new adapter", got=seed, fix="Set adapter=lora, or leave it out.")


def models_answer_what_is_asked(stage: StageConfig, train: LoopConfig) -> None:
    if not stage.writes and train.sample_rows:
        raise ConfigError(
            "train.sample_rows",
            f"must be 0 with stage={stage.name}, whose model generates no text",
            got=train.sample_rows,
        )
    if not stage.writes and train.eval_tasks:
        rule = f"must be empty with stage={stage.name}, whose model generates no text"
        raise ConfigError("train.eval_tasks", rule, got=train.eval_tasks)
    if train.eval_task_questions is not None and not train.eval_tasks:
        rule = "is for train.eval_tasks, of which there are none"
        raise ConfigError("train.eval_task_questions", rule, got=train.eval_task_questions)
    if not stage.has_right_answers and train.exact_match_rows:
        raise ConfigError(
            "train.exact_match_rows",
            f"must be 0 with stage={stage.name}, whose rows have no single right answer",
            got=train.exact_match_rows,
        )


def stages_read_what_is_said_of_their_rows(stage: StageConfig, data: DataConfig) -> None:
    unread: dict[str, Any] = {}
    if not stage.trains_turns:
        unread |= {"data.mask_history": data.mask_history, "data.train_on_prompt": data.train_on_prompt}
    if stage.plain_text:
        unread |= {
            "data.default_system": data.default_system,
            "data.tool_format": data.tool_format,
            "data.today": data.today,
            "data.preserve_thinking": data.preserve_thinking,
            "data.overlong": data.overlong if data.packing and data.overlong != "truncate" else None,
        }
    if not stage.reads_margins:
        unread["data.format.margin"] = data.format.pair_margin
    for setting, value in unread.items():
        if value:
            raise ConfigError(setting, f"is not read with stage={stage.name}", got=value, fix="Leave it out.")


def is_on_a_file_system(setting: str, value: str, why: str) -> None:
    if "://" in value:
        fix = "Name a folder. Only data.cache, and the output_dir of train, can be in an object store."
        raise ConfigError(setting, f"must be on a file system{why}", got=value, fix=fix)


def quantized_weights_can_be_had(adapter: AdapterConfig, quantization: QuantizationConfig, strategy: StrategyConfig) -> None:
    trains_all = adapter.trains_base
    if trains_all and not quantization.trains_base:
        raise ConfigError(
            "quantization",
            f"can't be {quantization.name} with adapter={adapter.option}: quantized weights can't be trained",
            fix="Set adapter=lora, or quantization=none.",
        )
    if quantization.replaces_layers and adapter.refuses_quantized is not None:
        rule = f"can't be {quantization.name} with adapter={adapter.option}: {adapter.refuses_quantized}"
        raise ConfigError("quantization", rule, fix="Set adapter=lora, or quantization=none.")
    if adapter.needs_quantized and not quantization.replaces_layers:
        rule = f"must be one with adapter={adapter.option}, which begins as what it takes off the weights"
        raise ConfigError("quantization", rule, got=quantization.name, fix="Set quantization=bnb_nf4, or adapter=lora.")
    refusal = strategy.refuses_quantized(trained=trains_all)
    if quantization.replaces_layers and refusal is not None:
        raise ConfigError(
            "strategy",
            f"can't be {strategy.option} if quantization={quantization.name}: {refusal}",
            fix="Set strategy=fsdp, or quantization=none.",
        )


def optimizer_finds_its_matrices(optimizer: OptimizerConfig, strategy: StrategyConfig) -> None:
    if optimizer.needs_whole is not None and not strategy.keeps_matrices:
        raise ConfigError(
            "strategy",
            f"can't be {strategy.option} with optimizer={optimizer.name}: {optimizer.needs_whole}",
            fix="Set strategy=fsdp, or optimizer=adamw.",
        )
    if optimizer.refuses_shards is not None and strategy.shards:
        rule = f"can't be {strategy.option} with a paged optimizer: {optimizer.refuses_shards}"
        raise ConfigError("strategy", rule, fix="Set strategy=ddp, or optimizer=adamw_8bit, whose state is sharded.")


def steps_have_one_micro_batch(optimizer: OptimizerConfig, train: LoopConfig, workers: int) -> None:
    """Layer-wise steps free gradients at once, so micro-batches can't accumulate. workers: the fewest that there may be."""
    if optimizer.layerwise and train.micro_batches(workers) > 1:
        rule = f"must be train.global_batch_size / workers ({train.global_batch_size} / {workers}) with optimizer.layerwise=true"
        why = "gradients are used up as they come, and can't add up"
        fix = "Raise it, lower train.global_batch_size, or set optimizer.layerwise=false."
        raise ConfigError("train.micro_batch_size", f"{rule}: {why}", got=train.micro_batch_size, fix=fix)


def tensors_can_step_one_by_one(
    optimizer: OptimizerConfig, strategy: StrategyConfig, resources: ResourcesConfig, train: LoopConfig
) -> None:
    if not optimizer.layerwise:
        return
    if optimizer.refuses_layerwise is not None:
        rule = f"must be false with optimizer={optimizer.name}: {optimizer.refuses_layerwise}"
        raise ConfigError("optimizer.layerwise", rule, got=True, fix="Set optimizer=adamw, or another.")
    if not strategy.keeps_matrices:
        rule = f"must be false with strategy={strategy.option}: DeepSpeed collects gradients for a step of its own"
        raise ConfigError("optimizer.layerwise", rule, got=True, fix="Set strategy=ddp or fsdp.")
    workers = resources.num_workers
    if not isinstance(workers, str):  # auto: known when the cluster is
        steps_have_one_micro_batch(optimizer, train, workers if isinstance(workers, int) else min(workers))
    refused = {
        "train.max_grad_norm": (train.max_grad_norm is not None, "null", "the norm of all is known when all have stepped"),
        "train.cuda_graphs": (train.cuda_graphs, "false", "a graph would hold all gradients"),
        "train.precision": (train.precision == "fp16", "bf16 or fp32", "a scaled loss needs steps that can be left out"),
    }
    for setting, (given, instead, why) in refused.items():
        if given:
            got = getattr(train, setting.partition(".")[2])
            raise ConfigError(
                setting,
                f"must be {instead} with optimizer.layerwise=true: {why}",
                got=got,
                fix=f"Set {setting}={instead}, or optimizer.layerwise=false.",
            )


def what_is_new_is_trained(model: ModelConfig, stage: StageConfig, adapter: AdapterConfig, optimizer: OptimizerConfig) -> None:
    """Parameters outside the layers that the run is to train (a score head, new embeddings, extra_modules) need an optimizer that
    trains such parameters."""
    if optimizer.trains_outside:
        return
    brought = {
        "the score head is": not stage.writes,
        "embeddings of new tokens are": model.adds_tokens,
        "adapter.extra_modules are": bool(adapter.trained_outside),
    }
    if named := [what for what, there in brought.items() if there]:
        rule = f"must be true to train what the run brings: {named[0]} in no layer"
        raise ConfigError("optimizer.outside_layers", rule, got=False, fix="Set it to true, or optimizer=adamw.")


def schedule_suits_the_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    if optimizer.schedules is not None and schedule.name not in optimizer.schedules:
        suits = " or ".join(sorted(optimizer.schedules))
        raise ConfigError(
            "schedule",
            f"must be {suits} with optimizer={optimizer.name}, which averages steps instead",
            got=schedule.name,
            fix=f"Set schedule={suits}.",
        )


def adapters_find_the_weights_that_they_read(adapter: AdapterConfig, strategy: StrategyConfig) -> None:
    why = adapter.refuses_partitioned
    if why is not None and strategy.gathers_in_hooks:
        rule = f"can't be zero3 with adapter={adapter.option}: {why}, and ZeRO-3 gathers those of layers that are called"
        raise ConfigError("strategy", rule, fix="Set strategy=fsdp, or adapter=lora.")


def new_tokens_can_be_trained(model: ModelConfig, adapter: AdapterConfig, strategy: StrategyConfig) -> None:
    if not model.adds_tokens:
        return
    setting = "model.new_tokens" if model.new_tokens else "model.resize_vocab"
    got = model.new_tokens or True
    if not adapter.trains_tokens:
        rule = f"can't be combined with adapter={adapter.option}, which trains no embeddings"
        raise ConfigError(setting, rule, got=got, fix="Set adapter=lora, or adapter=none.")
    if not adapter.trains_base and strategy.gathers_in_hooks:
        rule = "can't be combined with strategy=zero3 and an adapter: it gathers the weights of layers that are called"
        raise ConfigError(setting, rule, got=got, fix="Set strategy=fsdp.")


def shifted_attention_is_for_steps(model: ModelConfig, data: DataConfig, stage: StageConfig, train: LoopConfig) -> None:
    """Only training steps use S2 attention, so nothing that a step is compared with may be computed with full attention."""
    obstacles = {
        "data.share_prompts=true": data.share_prompts is True,
        f"stage={stage.name}, whose reference attends to all": stage.reference != "none",
        "train.cuda_graphs=true: groups are cut anew in each batch": train.cuda_graphs,
    }
    for obstacle, there in obstacles.items():
        if there and model.shift_attn_tokens is not None:
            rule = f"can't be combined with {obstacle}"
            raise ConfigError("model.shift_attn_tokens", rule, got=model.shift_attn_tokens, fix="Leave it out.")


def layers_can_be_compiled(train: LoopConfig, uncompiled: str | None) -> None:
    if train.compile is True and uncompiled is not None:
        raise ConfigError("train.compile", f"can't be true: {uncompiled}", got=True, fix="Set train.compile=auto.")
    never = train.compile is False or uncompiled is not None
    if train.activation_checkpointing == "selective" and never:
        raise ConfigError(
            "train.activation_checkpointing",
            f"can be selective only if layers are compiled{f': {uncompiled}' if uncompiled else ''}",
            got="selective",
            fix="Set full.",
        )


def layers_can_be_captured(
    data: DataConfig,
    stage: StageConfig,
    strategy: StrategyConfig,
    resources: ResourcesConfig,
    train: LoopConfig,
    uncompiled: str | None,
) -> None:
    if not train.cuda_graphs:
        return
    checkpointing = train.activation_checkpointing
    again = checkpointing == "full" and (train.compile is False or uncompiled is not None)
    workers = resources.num_workers
    obstacles = {
        f"strategy={strategy.option}": (strategy.shards, "Set strategy=ddp"),
        f"resources.num_workers={workers}": (workers not in (1, "auto"), "Set resources.num_workers=1"),
        "data.packing=false, whose batches are of many shapes": (not data.packing, "Set data.packing=true"),
        f"train.activation_checkpointing={checkpointing}, which waits for the host": (
            checkpointing == "offload" or again,
            "Set train.activation_checkpointing=none",
        ),
        "stage.router_aux_loss_coef, which reads routers": (
            stage.router_aux_loss_coef is not None,
            "Set stage.router_aux_loss_coef=null",
        ),
    }
    for obstacle, (there, fix) in obstacles.items():
        if there:
            raise ConfigError("train.cuda_graphs", f"can't be true with {obstacle}", got=True, fix=f"{fix}, or false.")


def references_can_be_had(stage: StageConfig, strategy: StrategyConfig) -> None:
    if stage.reference == "online" and strategy.gathers_in_hooks and not (stage.reference_model or stage.reference_adapter):
        raise ConfigError(
            "stage.reference",
            "must be precomputed with strategy=zero3, which can't compute a reference within a step",
            got=stage.reference,
            fix="Set stage.reference=precomputed, or strategy=fsdp.",
        )
