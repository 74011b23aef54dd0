"""The settings of each verb, as a tree of sections."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from typing import Any, Literal

from raytune_llm.config import rules
from raytune_llm.config.adapter import AdapterConfig
from raytune_llm.config.chat import ChatConfig
from raytune_llm.config.checkpoint import CheckpointConfig
from raytune_llm.config.data import DataConfig
from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.export import ON_NODES, ExportConfig, ExportedAdapter
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.optimizer import OptimizerConfig
from raytune_llm.config.predict import PredictConfig
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.config.resources import ResourcesConfig, on_cluster, uses_ray
from raytune_llm.config.schedule import ScheduleConfig
from raytune_llm.config.section import NonNegativeInt, PositiveInt, Seed, section
from raytune_llm.config.serve import EngineConfig, ServeConfig
from raytune_llm.config.stage import StageConfig
from raytune_llm.config.strategy import StrategyConfig
from raytune_llm.config.submit import JobServer, SubmitConfig
from raytune_llm.config.tracking import TrackingConfig
from raytune_llm.config.train import LoopConfig
from raytune_llm.config.tune import TuneConfig
from raytune_llm.errors import ConfigError


@section
class TrainRun:
    """`train` and `plan`."""

    name: str
    output_dir: str
    resume: Literal["auto", "never", "must"]
    log_format: Literal["text", "json"]
    """The format of the command's output. json: one line for each event, for programs that read logs (report/events.py)."""
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
        """The reason why its layers can't be compiled on any device; None if they can."""
        if self.strategy.gathers_in_hooks:
            return f"strategy={self.strategy.option} gathers weights in hooks of the layers"
        if self.stage.router_aux_loss_coef is not None:
            return "stage.router_aux_loss_coef reads routers within the layers"
        if self.model.liger_kernel:
            return "model.liger_kernel has kernels of its own in the layers"
        return self.adapter.refuses_compiled

    @property
    def needs_evaluations(self) -> bool:
        """Whether its evaluations matter: they stop it or choose its final weights, or the user said when they are."""
        return self.train.early_stopping is not None or self.checkpoint.keeps_best or self.train.eval_at is not None

    @property
    def fits_one_process(self) -> bool:
        """Whether one process can run it, without a group of workers: nothing is sharded."""
        return not self.strategy.shards

    def __post_init__(self) -> None:
        rules.name_is_a_name(self.name)
        rules.batch_sizes_fit(self.data, self.resources, self.train)
        rules.held_out_rows_exist_where_they_are_used(self.data, self.checkpoint, self.train)
        rules.runs_stop_by_a_figure_that_is_reported(self.data, self.stage, self.train)
        rules.model_is_given(self.model)
        rules.data_are_given(self.data)
        rules.streams_know_what_they_need(self.data, self.stage, self.checkpoint, self.train)
        rules.sharding_has_workers(self.strategy, self.resources)
        rules.quantized_weights_can_be_had(self.adapter, self.quantization, self.strategy)
        rules.optimizer_finds_its_matrices(self.optimizer, self.strategy)
        rules.tensors_can_step_one_by_one(self.optimizer, self.strategy, self.resources, self.train)
        rules.what_is_new_is_trained(self.model, self.stage, self.adapter, self.optimizer)
        rules.schedule_suits_the_optimizer(self.optimizer, self.schedule)
        rules.adapters_find_the_weights_that_they_read(self.adapter, self.strategy)
        rules.new_tokens_can_be_trained(self.model, self.adapter, self.strategy)
        rules.shifted_attention_is_for_steps(self.model, self.data, self.stage, self.train)
        rules.anchored_policies_have_a_new_adapter(self.stage, self.adapter)
        rules.adapters_are_drawn(self.adapter, self.train)
        rules.models_answer_what_is_asked(self.stage, self.train)
        rules.references_can_be_had(self.stage, self.strategy)
        rules.layers_can_be_compiled(self.train, self.uncompiled)
        rules.layers_can_be_captured(self.data, self.stage, self.strategy, self.resources, self.train, self.uncompiled)
        rules.stages_read_what_is_said_of_their_rows(self.stage, self.data)


def as_train_run(run: TrainRun) -> TrainRun:
    """The run without the sections that a sweep's or a job's config adds."""
    return TrainRun(**{field.name: getattr(run, field.name) for field in fields(TrainRun)})  # pyright: ignore[reportArgumentType]  # pydantic's dataclasses are dataclasses


@section
class TuneRun(TrainRun):
    """`tune`: the run that a sweep varies, and how. `output_dir` is the sweep's folder."""

    tune: TuneConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        rules.is_on_a_file_system("output_dir", self.output_dir, " for a sweep")
        if isinstance(self.resources.num_workers, list):
            rule, fix = "must be one number for a sweep, whose trials keep their size", "Set one number."
            raise ConfigError("resources.num_workers", rule, got=self.resources.num_workers, fix=fix)
        needs = self.needs_evaluations
        rules.trials_are_judged(self.data, self.resources, self.stage, self.train, self.tune, needs_evaluations=needs)
        rules.trials_are_judged_after_the_warm_up(self.schedule, self.train, self.tune)


@section
class PrepareRun:
    """`prepare`: no weights, no training."""

    model: ModelConfig
    data: DataConfig
    stage: StageConfig
    resources: ResourcesConfig
    seed: Seed
    look: NonNegativeInt
    """Show this many rows as the model sees them, with trained text in another colour."""

    def __post_init__(self) -> None:
        rules.model_is_given(self.model)
        rules.data_are_given(self.data)
        rules.stages_read_what_is_said_of_their_rows(self.stage, self.data)


@section
class ServeRun:
    """`serve`."""

    model: ModelConfig
    quantization: QuantizationConfig
    engine: EngineConfig
    resources: ResourcesConfig
    serve: ServeConfig

    def __post_init__(self) -> None:
        rules.model_is_given(self.model)
        serve, resources = self.serve, self.resources
        if serve.write is not None:
            _can_be_written(self)
        elif not serve.on_loopback and serve.api_key is None and not os.environ.get(API_KEY):
            raise ConfigError(
                "serve.api_key",
                "must be given if serve.host is not a loopback address: otherwise everybody who reaches it could use the server",
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
    """Raises ConfigError unless the run can be written as a Ray Serve config: it uses Ray, and holds no secret keys."""
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
            rules.model_is_given(self.model)


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
        rules.is_on_a_file_system("output_dir", self.output_dir, " for predictions")
        rules.model_or_run_is_given(self.model, "predict.run", self.predict.run)
        rules.data_are_given(self.data)
        rules.data_are_not_trained_on(self.data)


@section
class CompareRun:
    """`compare`: runs side by side."""

    runs: list[str]
    """The output folders of the runs: the words after the verb."""
    page: str | None
    """Write the comparison to this HTML file too."""

    def __post_init__(self) -> None:
        if not self.runs:
            fix = "For example, raytune-llm compare outputs/*."
            raise ConfigError("runs", "must name output folders of runs", fix=fix)


CHAINED = ("prepare", "train", "tune", "predict", "evaluate", "export")
"""Verbs that a chain can run: they end by themselves and leave a result."""


@section
class ChainRun:
    """`chain`: commands one after another. Each may use what the earlier ones wrote."""

    steps: dict[str, list[str]]
    """Step name -> a verb and its overrides, as words of a command line. They run in this order."""
    also: dict[str, list[str]]
    """Step name -> overrides to add."""

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
        """The verb of a step and its overrides."""
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
        rules.is_on_a_file_system("output_dir", self.output_dir, " for an evaluation")
        if not self.evaluate.models:
            rules.model_is_given(self.model)


@section
class ExportRun:
    """`export`: a model as other programs load it."""

    model: ModelConfig
    adapter: ExportedAdapter
    data: DataConfig
    """Rows for calibrating a quantized model and for comparing an export with its source. Without data.path: the run's data."""
    resources: ResourcesConfig
    """Where gptq and awq are computed and hf files are written. local and cluster: by Ray tasks, one per file."""
    export: ExportConfig

    def __post_init__(self) -> None:
        if self.data.path is not None or self.data.dataset_info is not None:
            rules.data_are_not_trained_on(self.data)
        if uses_ray(self.resources) and self.export.format not in ON_NODES:
            formats = f"{', '.join(ON_NODES[:-1])} or {ON_NODES[-1]}"
            rule = f"must be inline but for export.format={formats}: this process writes the files"
            raise ConfigError("resources", rule, got=self.resources.name, instead="resources=inline")
        if self.export.output_dir is not None:
            rules.is_on_a_file_system("export.output_dir", self.export.output_dir, " for an export")
        rules.model_or_run_is_given(self.model, "export.run", self.export.run)
        if self.export.run is not None and self.adapter.path is not None:
            fix = "Leave one of them out: a run says which adapter it trained. export.adapters has more."
            raise ConfigError("adapter.path", "can't be combined with export.run", got=self.adapter.path, fix=fix)
        if self.export.run is None and self.model.weights == "random":
            raise ConfigError("model.weights", "must be pretrained, to be exported", got="random")
        if self.model.config:
            rule = "must be empty: an export has the config that its weights were trained with"
            raise ConfigError("model.config", rule, got=self.model.config)
        if self.model.positions is not None:
            rule = "must be null: an export has the positions that its weights were trained with"
            raise ConfigError("model.positions", rule, got=self.model.positions)


API_KEY, ADMIN_KEY = "RAYTUNE_LLM_API_KEY", "RAYTUNE_LLM_ADMIN_KEY"
"""Environment variables for secrets, which should not be in config files."""


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
    """The experiment is written to experiment/ in this folder, which `--config-dir` then names."""
    dataset_info: str | None
    """A dataset_info.json or its folder; null: the one in the file's dataset_dir."""
    world_size: PositiveInt | None
    """Number of GPUs that the file was meant for, since LLaMA-Factory's batch grows with it. null: its ray_num_workers, or 1."""
    overwrite: bool
    """Replace an experiment of this name."""

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
    """`jobs`: the jobs of a cluster."""

    action: Literal["list", "status", "logs", "stop", "fetch"]
    """The first word after the verb."""
    job: str | None
    """The second word: the id of a job, or the name of a run, which means its newest job."""
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
