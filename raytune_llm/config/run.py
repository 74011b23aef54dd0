"""The tree of settings of each verb, and the rules between sections."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import Any, Literal

from raytune_llm.config.adapter import AdapterConfig
from raytune_llm.config.chat import ChatConfig
from raytune_llm.config.checkpoint import CheckpointConfig
from raytune_llm.config.data import DataConfig
from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.export import CALIBRATED, ExportConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.predict import PredictConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.resources import ResourcesConfig, on_cluster, uses_ray, worker_counts
from raytune_llm.config.schedule import ScheduleConfig
from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.config.serve import EngineConfig, ServeConfig
from raytune_llm.config.stage import StageConfig
from raytune_llm.config.strategy import StrategyConfig
from raytune_llm.config.submit import JobServer, SubmitConfig
from raytune_llm.config.tracking import TrackingConfig
from raytune_llm.config.train import LoopConfig
from raytune_llm.config.tune import EVALUATIONS, EXACT_MATCH, TuneConfig
from raytune_llm.errors import ConfigError


@section
class TrainRun:
    """`train` and `plan`."""

    name: str
    output_dir: str
    resume: Literal["auto", "never", "must"]
    log_format: Literal["text", "json"]
    """The format of what the command prints. json: a line for each event, for programs that read logs (report/events.py)."""
    model: ModelConfig
    data: DataConfig
    stage: StageConfig
    adapter: AdapterConfig
    quantization: QuantizationConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    strategy: StrategyConfig
    resources: ResourcesConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    train: LoopConfig

    @property
    def uncompiled(self) -> str | None:
        """Why its layers can't be compiled on any device; None where they can."""
        if self.strategy.gathers_in_hooks:
            return f"strategy={self.strategy.option} gathers weights in hooks of the layers"
        if self.stage.router_aux_loss_coef is not None:
            return "stage.router_aux_loss_coef reads routers within the layers"
        return self.adapter.refuses_compiled

    @property
    def fits_one_process(self) -> bool:
        """It needs no group of workers: nothing of it is sharded."""
        return not self.strategy.shards

    def __post_init__(self) -> None:
        _name_is_a_name(self.name)
        _batch_sizes_fit(self)
        _held_out_rows_exist_where_they_are_used(self)
        _model_is_given(self.model)
        _data_are_given(self.data)
        _streams_know_what_they_need(self)
        _sharding_has_workers(self)
        _quantized_weights_can_be_had(self)
        _optimizer_finds_its_matrices(self)
        _schedule_suits_the_optimizer(self)
        _adapters_find_the_weights_that_they_read(self)
        _new_tokens_can_be_trained(self)
        _anchored_policies_have_a_new_adapter(self)
        _adapters_are_drawn(self)
        _models_answer_what_is_asked(self)
        _references_can_be_had(self)
        _layers_can_be_compiled(self)
        _layers_can_be_captured(self)
        _stages_read_what_is_said_of_their_rows(self.stage, self.data)


def as_train_run(run: TrainRun) -> TrainRun:
    """The run alone, without what a sweep's or a job's config adds."""
    return TrainRun(**{field.name: getattr(run, field.name) for field in fields(TrainRun)})  # pyright: ignore[reportArgumentType]  # pydantic's dataclasses are dataclasses


@section
class TuneRun(TrainRun):
    """`tune`: the run that a sweep varies, and how. `output_dir` is the sweep's folder."""

    tune: TuneConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        _is_no_address("output_dir", self.output_dir, " for a sweep")
        if isinstance(self.resources.num_workers, list):
            rule, fix = "must be one number for a sweep, whose trials keep their size", "Set one number."
            raise ConfigError("resources.num_workers", rule, got=self.resources.num_workers, fix=fix)
        _trials_are_judged(self)


@section
class PrepareRun:
    """`prepare`: no weights, no training."""

    model: ModelConfig
    data: DataConfig
    stage: StageConfig
    resources: ResourcesConfig
    seed: Seed
    look: NonNegativeInt
    """Show so many rows as the model sees them, what is trained in another colour."""

    def __post_init__(self) -> None:
        _model_is_given(self.model)
        _data_are_given(self.data)
        _stages_read_what_is_said_of_their_rows(self.stage, self.data)


@section
class ServeRun:
    """`serve`."""

    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    resources: ResourcesConfig
    serve: ServeConfig

    def __post_init__(self) -> None:
        _model_is_given(self.model)
        serve, resources = self.serve, self.resources
        if serve.write is not None:
            _can_be_written(self)
        elif not serve.on_loopback and serve.api_key is None and not os.environ.get(API_KEY):
            raise ConfigError(
                "serve.api_key",
                "must be given if serve.host is no loopback address: otherwise everybody who reaches it could use the server",
                got="null",
                fix=f"Set {API_KEY} in the environment, or serve.host=127.0.0.1.",
            )
        if not uses_ray(resources):
            _engine_is_here(self.engine)
        if not uses_ray(resources) and serve.max_replicas > 1:
            fix = "Set resources=local or resources=cluster."
            raise ConfigError(
                "serve.replicas", "must be 1 with resources=inline, which is one process", got=serve.max_replicas, fix=fix
            )
        if uses_ray(resources) and resources.num_workers != "auto":
            fix = "Set serve.replicas."
            raise ConfigError("resources.num_workers", "is for training, not for serving", got=resources.num_workers, fix=fix)


def _engine_is_here(engine: EngineConfig) -> None:
    if engine.python is not None:
        rule, fix = "is for engines of Ray Serve, which are other processes", "Start this command with that Python."
        raise ConfigError("engine.python", rule, got=engine.python, fix=fix)


def _can_be_written(run: ServeRun) -> None:
    """As Ray Serve's config: where it runs is known, and no secret comes into a file."""
    if not uses_ray(run.resources):
        fix = "Set resources=cluster."
        raise ConfigError("serve.write", "is for Ray Serve, which resources=inline does not use", got=run.serve.write, fix=fix)
    for setting, key in (("serve.api_key", run.serve.api_key), ("serve.admin_key", run.serve.admin_key)):
        if key is not None:
            fix = f"Set {API_KEY} and {ADMIN_KEY} in the environment of the cluster's nodes."
            raise ConfigError(setting, "must not be given with serve.write, which writes no keys", got="a key", fix=fix)


@section
class ChatRun:
    """`chat`."""

    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    chat: ChatConfig

    def __post_init__(self) -> None:
        _engine_is_here(self.engine)
        if self.chat.url is None:
            _model_is_given(self.model)


@section
class PredictRun:
    """`predict`: answers for a data set."""

    output_dir: str | None
    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    data: DataConfig
    resources: ResourcesConfig
    predict: PredictConfig

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ConfigError("output_dir", "must be given", fix="For example, output_dir=outputs/mine/predictions.")
        _is_no_address("output_dir", self.output_dir, " for predictions")
        _model_or_run_is_given(self.model, "predict.run", self.predict.run)
        _data_are_given(self.data)
        _data_are_read_only(self.data)


@section
class CompareRun:
    """`compare`: runs side by side."""

    runs: list[str]
    """Their output folders: the words after the verb."""
    page: str | None
    """A file for the same as HTML."""

    def __post_init__(self) -> None:
        if not self.runs:
            fix = "For example, raytune-llm compare outputs/*."
            raise ConfigError("runs", "must name output folders of runs", fix=fix)


CHAINED = ("prepare", "train", "tune", "predict", "evaluate", "export")
"""Verbs that end by themselves and leave a result."""


@section
class ChainRun:
    """`chain`: commands one after another, each of which may need what those before it wrote."""

    steps: dict[str, list[str]]
    """By name, in order: a verb and its settings, as words of a command line."""
    also: dict[str, list[str]]
    """By the names of steps: settings that are added."""

    def __post_init__(self) -> None:
        if not self.steps:
            fix = "For example, raytune-llm chain +experiment=sft_then_dpo_then_export_smollm2."
            raise ConfigError("steps", "must have commands", got="none", fix=fix)
        for name, words in self.steps.items():
            if not words or words[0] not in CHAINED:
                rule = f"must begin with a verb of {', '.join(CHAINED)}"
                raise ConfigError(f"steps.{name}", rule, got=" ".join(words) or "nothing")
        if unknown := sorted(self.also.keys() - self.steps.keys()):
            raise ConfigError("also", f"must have names of steps ({', '.join(self.steps)})", got=unknown)

    def words(self, name: str) -> list[str]:
        """The verb of a step and its settings."""
        return [*self.steps[name], *self.also.get(name, ())]


@section
class EvaluateRun:
    """`evaluate`: benchmarks."""

    output_dir: str | None
    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    resources: ResourcesConfig
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ConfigError("output_dir", "must be given", fix="For example, output_dir=outputs/mmlu.")
        _is_no_address("output_dir", self.output_dir, " for an evaluation")
        _model_or_run_is_given(self.model, "evaluate.models", " ".join(self.evaluate.models) or None)


@section
class ExportRun:
    """`export`: a model as other programs load it."""

    model: ModelConfig
    data: DataConfig
    """Rows to calibrate a quantized model with, and to compare an export with its source on. Without data.path: the run's."""
    resources: ResourcesConfig
    """Where gptq and awq are computed."""
    export: ExportConfig

    def __post_init__(self) -> None:
        if self.data.path is not None or self.data.dataset_info is not None:
            _data_are_read_only(self.data)
        if uses_ray(self.resources) and self.export.format not in CALIBRATED:
            rule = f"must be inline but for export.format={' or '.join(CALIBRATED)}: this process writes the files"
            raise ConfigError("resources", rule, got=self.resources.name, instead="resources=inline")
        if self.export.output_dir is not None:
            _is_no_address("export.output_dir", self.export.output_dir, " for an export")
        _model_or_run_is_given(self.model, "export.run", self.export.run)
        if self.export.run is None and self.model.weights == "random":
            raise ConfigError("model.weights", "must be pretrained, to be exported", got="random")
        if self.model.config:
            rule = "must be empty: an export has the config that its weights were trained with"
            raise ConfigError("model.config", rule, got=self.model.config)


API_KEY, ADMIN_KEY = "RAYTUNE_LLM_API_KEY", "RAYTUNE_LLM_ADMIN_KEY"
"""Environment variables of secrets, which no config file should hold."""


@section
class DoctorRun:
    """`doctor` looks at the machine, not at a run."""


@section
class ImportRun:
    """`import`: a training file of LLaMA-Factory becomes an experiment of ours."""

    file: str | None
    """The first word after the verb."""
    name: str | None
    """The name of the experiment; null: the file's."""
    config_dir: str
    """The experiment goes to experiment/ in this folder, for `--config-dir`."""
    dataset_info: str | None
    """A dataset_info.json or its folder; null: the one in the file's dataset_dir."""
    world_size: PositiveInt | None
    """GPUs that the file was meant for: a step's batch grows with them. null: its ray_num_workers, 1 where it has none."""
    overwrite: bool
    """Take the place of an experiment that is there."""

    def __post_init__(self) -> None:
        if self.file is None:
            raise ConfigError(
                "file", "must name a training file of LLaMA-Factory", fix="For example, raytune-llm import FILE.yaml."
            )
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError("name", "must consist of letters, digits, dots, hyphens and underscores", got=self.name)


@section
class SubmitRun(TrainRun):
    """`submit`: a run as a job of a cluster."""

    submit: SubmitConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not on_cluster(self.resources):
            raise ConfigError(
                "resources",
                "must be cluster for a job: its driver joins the cluster that it is submitted to",
                got=self.resources.name,
                instead="resources=cluster",
            )


@section
class JobsRun:
    """`jobs`: what a cluster has of them."""

    action: Literal["list", "status", "logs", "stop", "fetch"]
    """The first word after the verb."""
    job: str | None
    """The second: a job, or a run's name for the newest of it."""
    submit: JobServer

    def __post_init__(self) -> None:
        if self.job is None and self.action != "list":
            raise ConfigError("job", "must name a job or its run", fix=f"For example, raytune-llm jobs {self.action} NAME.")


RUNS: dict[str, Any] = {
    "train": TrainRun,
    "submit": SubmitRun,
    "jobs": JobsRun,
    "plan": TrainRun,
    "tune": TuneRun,
    "chain": ChainRun,
    "prepare": PrepareRun,
    "import": ImportRun,
    "doctor": DoctorRun,
    "serve": ServeRun,
    "chat": ChatRun,
    "predict": PredictRun,
    "export": ExportRun,
    "compare": CompareRun,
    "evaluate": EvaluateRun,
}


def _model_or_run_is_given(model: ModelConfig, setting: str, folder: str | None) -> None:
    if folder is None:
        _model_is_given(model)
    elif model.path is not None or model.config:
        fix = "Leave one of them out: a run says what model it trained."
        raise ConfigError("model", f"can't be combined with {setting}", got=model.path or model.config, fix=fix)


def _data_are_read_only(data: DataConfig) -> None:
    """Settings that are for training on the data, which a user may have meant to change something here."""
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


def _name_is_a_name(name: str) -> None:
    """It names the output folder, and a served model later."""
    if not name.strip() or "/" in name or "\\" in name or name in (".", ".."):
        raise ConfigError(
            "name",
            "must be a name without slashes, since output_dir ends with it",
            got=name,
            fix="Set output_dir for another place.",
        )


def _batch_sizes_fit(run: TrainRun) -> None:
    """As far as the number of workers is known; runs/ray_group.py has the rest."""
    workers = run.resources.num_workers
    if isinstance(workers, list):
        _group_can_change(run, workers)
    run.train.micro_batches(workers if isinstance(workers, int) else 1)


def _group_can_change(run: TrainRun, workers: list[int]) -> None:
    fewest, most = workers
    if fewest >= most:
        fix = "For example, resources.num_workers=[2,8]."
        raise ConfigError("resources.num_workers", "must be a range [fewest,most] with fewest < most", got=workers, fix=fix)
    if run.data.streaming:
        fix = "Set one number, or data.streaming=false."
        raise ConfigError("resources.num_workers", "can't be a range with data.streaming=true", got=workers, fix=fix)
    micro, total = run.train.micro_batch_size, run.train.global_batch_size
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


def _trials_are_judged(run: TuneRun) -> None:
    metric, data, train = run.tune.metric, run.data, run.train
    if not uses_ray(run.resources) and (run.tune.max_concurrent or 1) > 1 and run.tune.share_base is not True:
        fix = "Set resources=local, or tune.share_base=true."
        raise ConfigError(
            "tune.max_concurrent", "must be 1 with resources=inline, which is one process", got=run.tune.max_concurrent, fix=fix
        )
    if train.pause_at is not None:
        rule = "is for a run by itself: a sweep's trials wait where tune.pause_at says"
        raise ConfigError("train.pause_at", rule, got=train.pause_at, fix=f"Set tune.pause_at={train.pause_at}.")
    if metric.startswith(EVALUATIONS) and not data.evaluates:
        fix = "Set data.eval_fraction (say 0.1) or data.eval_path."
        raise ConfigError("tune.metric", "needs held-out rows", got=metric, fix=fix)
    if metric == EXACT_MATCH and not train.exact_match_rows:
        raise ConfigError(
            "tune.metric", "needs train.exact_match_rows above 0", got=metric, fix="Say, train.exact_match_rows=100."
        )
    if not metric.startswith(EVALUATIONS) and not run.tune.at_end:
        fix = "Say, tune.metric=eval_loss, exact_match or module:function."
        raise ConfigError("tune.metric", "must be a figure of an evaluation or of a trial's end", got=metric, fix=fix)
    if run.tune.scheduler != "none" and train.eval_every_steps is None and train.epochs <= 1:
        raise ConfigError(
            "train.eval_every_steps",
            f"must be given where tune.scheduler={run.tune.scheduler}: trials are compared at their evaluations, and one "
            "at the end is too late",
            got="null",
            fix="Say, a tenth of the steps.",
        )


def _held_out_rows_exist_where_they_are_used(run: TrainRun) -> None:
    if run.data.evaluates:
        return
    users = {
        "train.eval_every_steps": run.train.eval_every_steps,
        "train.early_stopping": run.train.early_stopping,
        "train.exact_match_rows": run.train.exact_match_rows or None,
        "train.sample_rows": run.train.sample_rows or None,
        "checkpoint.final": "best" if run.checkpoint.final == "best" else None,
    }
    for setting, value in users.items():
        if value is not None:
            raise ConfigError(
                setting,
                "needs held-out rows",
                got=value,
                fix="Set data.eval_fraction (say 0.1), data.eval_rows or data.eval_path.",
            )


def _model_is_given(model: ModelConfig) -> None:
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


def _data_are_given(data: DataConfig) -> None:
    if data.path is None and data.dataset_info is None:
        raise ConfigError("data.path", "must name a file, a folder or a hub data set", fix="For example, data.path=rows.jsonl.")
    _is_no_address("data.cache", data.cache, ", since token stores are mapped into memory")


def _streams_know_what_they_need(run: TrainRun) -> None:
    """How long a stream is shows at its end: what depends on its length, or on all its rows, has no answer before."""
    if not run.data.streaming:
        return
    needed = {"train.max_steps": run.train.max_steps, "checkpoint.every_steps": run.checkpoint.every_steps}
    for setting, value in needed.items():
        if value is None:
            raise ConfigError(
                setting,
                "must be given if data.streaming=true: the end of an epoch is not known beforehand",
                got="null",
                fix=f"For example, {setting}=1000, or set data.streaming=false.",
            )
    refused = {
        "train.epochs": (run.train.epochs, run.train.epochs != 1, "Leave it at 1: train.max_steps says how long."),
        "data.eval_fraction": (run.data.eval_fraction, run.data.eval_fraction, "Set data.eval_path or data.eval_names."),
        "data.eval_rows": (run.data.eval_rows, run.data.eval_rows, "Set data.eval_path or data.eval_names."),
        "data.names": (run.data.names, len(run.data.names) > 1, "Use one data set, or set data.streaming=false."),
        "stage.reference": (
            "precomputed",
            run.stage.reference == "precomputed",
            "Set stage.reference=online, since a pass over all rows comes first, or data.streaming=false.",
        ),
        "data.mix_epochs": (run.data.mix_epochs, run.data.mix_epochs, "Remove it, or set data.streaming=false."),
    }
    for setting, (value, given, fix) in refused.items():
        if given:
            raise ConfigError(setting, "can't be combined with data.streaming=true", got=value, fix=fix)


def _sharding_has_workers(run: TrainRun) -> None:
    if not uses_ray(run.resources) and not run.fits_one_process:
        raise ConfigError(
            "strategy",
            "must be ddp if resources=inline, which is one process",
            got=run.strategy.option,
            fix="Set resources=local.",
        )


def _anchored_policies_have_a_new_adapter(run: TrainRun) -> None:
    if run.stage.anchored and not run.adapter.starts_at_base:
        raise ConfigError(
            "stage.loss",
            "can be asft with a new adapter only (adapter=lora adapter.path=null): its reference is the model without it",
            got="asft",
            fix="Set stage.loss=dft, or merge the existing adapter into the model.",
        )


def _adapters_are_drawn(run: TrainRun) -> None:
    seed = run.train.adapter_seed
    if seed is not None and run.adapter.trains_base:
        raise ConfigError("train.adapter_seed", "is for a new adapter", got=seed, fix="Set adapter=lora, or leave it out.")


def _models_answer_what_is_asked(run: TrainRun) -> None:
    if not run.stage.writes and run.train.sample_rows:
        raise ConfigError(
            "train.sample_rows",
            f"must be 0 with stage={run.stage.name}, whose model generates no text",
            got=run.train.sample_rows,
        )
    if not run.stage.has_right_answers and run.train.exact_match_rows:
        raise ConfigError(
            "train.exact_match_rows",
            f"must be 0 with stage={run.stage.name}, whose rows have no single right answer",
            got=run.train.exact_match_rows,
        )


def _stages_read_what_is_said_of_their_rows(stage: StageConfig, data: DataConfig) -> None:
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


def _is_no_address(setting: str, value: str, why: str) -> None:
    if "://" in value:
        fix = "Name a folder. The output_dir of train alone can be in an object store."
        raise ConfigError(setting, f"must be on a file system{why}", got=value, fix=fix)


def _quantized_weights_can_be_had(run: TrainRun) -> None:
    quantization, trains_all = run.quantization, run.adapter.trains_base
    if trains_all and not quantization.trains_base:
        raise ConfigError(
            "quantization",
            f"can't be {quantization.name} if adapter=none: its weights can't be trained",
            fix="Set adapter=lora, or quantization=none.",
        )
    if quantization.replaces_layers and run.adapter.refuses_quantized is not None:
        rule = f"can't be {quantization.name} with adapter={run.adapter.name}: {run.adapter.refuses_quantized}"
        raise ConfigError("quantization", rule, fix="Set adapter=lora, or quantization=none.")
    if run.adapter.needs_quantized and not quantization.replaces_layers:
        rule = f"must be one with adapter={run.adapter.name}, which begins as what it takes off the weights"
        raise ConfigError("quantization", rule, got=quantization.name, fix="Set quantization=bnb_nf4, or adapter=lora.")
    refusal = run.strategy.refuses_quantized(trained=trains_all, whole_numbers=quantization.whole_numbers)
    if quantization.replaces_layers and refusal is not None:
        raise ConfigError(
            "strategy",
            f"can't be {run.strategy.option} if quantization={quantization.name}: {refusal}",
            fix="Set strategy=ddp, or quantization=none.",
        )


def _optimizer_finds_its_matrices(run: TrainRun) -> None:
    if run.optimizer.needs_whole is not None and not run.strategy.keeps_matrices:
        raise ConfigError(
            "strategy",
            f"can't be {run.strategy.option} with optimizer={run.optimizer.name}: {run.optimizer.needs_whole}",
            fix="Set strategy=fsdp, or optimizer=adamw.",
        )


def _schedule_suits_the_optimizer(run: TrainRun) -> None:
    if run.optimizer.schedules is not None and run.schedule.name not in run.optimizer.schedules:
        suits = " or ".join(sorted(run.optimizer.schedules))
        raise ConfigError(
            "schedule",
            f"must be {suits} with optimizer={run.optimizer.name}, which averages steps instead",
            got=run.schedule.name,
            fix=f"Set schedule={suits}.",
        )


def _adapters_find_the_weights_that_they_read(run: TrainRun) -> None:
    why = run.adapter.refuses_partitioned
    if why is not None and run.strategy.gathers_in_hooks:
        rule = f"can't be zero3 with adapter={run.adapter.name}: {why}, and ZeRO-3 gathers those of layers that are called"
        raise ConfigError("strategy", rule, fix="Set strategy=fsdp, or adapter=lora.")


def _new_tokens_can_be_trained(run: TrainRun) -> None:
    if not run.model.adds_tokens:
        return
    setting = "model.new_tokens" if run.model.new_tokens else "model.resize_vocab"
    got = run.model.new_tokens or True
    if not run.adapter.trains_tokens:
        rule = f"can't be combined with adapter={run.adapter.name}, which trains no embeddings"
        raise ConfigError(setting, rule, got=got, fix="Set adapter=lora, or adapter=none.")
    if not run.adapter.trains_base and run.strategy.gathers_in_hooks:
        rule = "can't be combined with strategy=zero3 and an adapter: it gathers the weights of layers that are called"
        raise ConfigError(setting, rule, got=got, fix="Set strategy=fsdp.")


def _layers_can_be_compiled(run: TrainRun) -> None:
    if run.train.compile is True and run.uncompiled is not None:
        raise ConfigError("train.compile", f"can't be true: {run.uncompiled}", got=True, fix="Set train.compile=auto.")
    never = run.train.compile is False or run.uncompiled is not None
    if run.train.activation_checkpointing == "selective" and never:
        raise ConfigError(
            "train.activation_checkpointing",
            f"can be selective only if layers are compiled{f': {run.uncompiled}' if run.uncompiled else ''}",
            got="selective",
            fix="Set full.",
        )


def _layers_can_be_captured(run: TrainRun) -> None:
    if not run.train.cuda_graphs:
        return
    checkpointing = run.train.activation_checkpointing
    again = checkpointing == "full" and (run.train.compile is False or run.uncompiled is not None)
    workers = run.resources.num_workers
    obstacles = {
        f"strategy={run.strategy.option}": (not run.fits_one_process, "Set strategy=ddp"),
        f"resources.num_workers={workers}": (workers not in (1, "auto"), "Set resources.num_workers=1"),
        "data.packing=false, whose batches are of many shapes": (not run.data.packing, "Set data.packing=true"),
        f"train.activation_checkpointing={checkpointing}, which waits for the host": (
            checkpointing == "offload" or again,
            "Set train.activation_checkpointing=none",
        ),
        "stage.router_aux_loss_coef, which reads routers": (
            run.stage.router_aux_loss_coef is not None,
            "Set stage.router_aux_loss_coef=null",
        ),
    }
    for obstacle, (there, fix) in obstacles.items():
        if there:
            raise ConfigError("train.cuda_graphs", f"can't be true with {obstacle}", got=True, fix=f"{fix}, or false.")


def _references_can_be_had(run: TrainRun) -> None:
    stage = run.stage
    partitioned = run.strategy.gathers_in_hooks
    if stage.reference == "online" and partitioned and not (stage.reference_model or stage.reference_adapter):
        raise ConfigError(
            "stage.reference",
            "must be precomputed with strategy=zero3, which can't compute a reference within a step",
            got=stage.reference,
            fix="Set stage.reference=precomputed, or strategy=fsdp.",
        )
