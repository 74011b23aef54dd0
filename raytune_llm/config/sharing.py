"""Decides which runs can train their LoRA adapters in one pass over one base (tune.share_base): those that see the same packs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raytune_llm.config.plain import as_plain, flat_items
from raytune_llm.config.resources import uses_ray
from raytune_llm.config.run import TrainRun
from raytune_llm.errors import ConfigError

VARIES = (
    "adapter.rslora", "adapter.rank", "adapter.alpha", "adapter.dropout", "optimizer.", "schedule.", "stage.",
    "train.adapter_seed", "train.epochs", "train.max_steps", "train.pause_at", "train.max_grad_norm", "train.max_nonfinite_steps",
    "train.early_stopping", "train.log_every_steps", "train.eval_every_steps", "train.eval_at", "train.eval_on_start",
    "train.sample_rows", "train.max_new_tokens", "checkpoint.every_steps", "checkpoint.final", "checkpoint.keep",
    "checkpoint.asynchronous",
)  # fmt: skip
"""Settings that may differ between the runs, or prefixes of them."""
FIXED = ("stage.name", "stage.reference", "stage.reference_model", "stage.reference_adapter")
"""Settings under the prefixes of VARIES that must still be equal, because they change the rows or the reference."""
OWN = ("name", "output_dir", "resume")
WAY_OUT = "Set tune.share_base=false."


def elsewhere(run: TrainRun) -> ConfigError | None:
    """An error if the run uses Ray: trials that share a base train in the sweep's own process."""
    return _refused("resources", "must be inline", run.resources.name) if uses_ray(run.resources) else None


def obstacle(run: TrainRun, base: TrainRun) -> ConfigError | None:
    """The first rule that keeps a run from sharing the base of another one, as an error; None if there is none."""
    return next(_obstacles(run, base), None)


def _obstacles(run: TrainRun, base: TrainRun) -> Iterator[ConfigError]:
    mine, theirs = dict(flat_items(as_plain(run))), dict(flat_items(as_plain(base)))
    if not run.adapter.shares_pass:
        rule = "must be lora or rslora on named layers or all-linear, without patterns of ranks or whole modules,"
        yield _refused("adapter", rule, run.adapter.option)
    elif run.adapter.path is not None:
        yield _refused("adapter.path", "must be null", run.adapter.path)
    if not run.stage.writes:
        yield _refused("stage", "can't be that of a model with a score head, which is trained whole", run.stage.name)
    if run.optimizer.schedules is not None:
        yield _refused("optimizer", "can't be one that averages steps", run.optimizer.name)
    if run.optimizer.layerwise:
        yield _refused("optimizer.layerwise", "must be false", True)
    if run.stage.reference == "online":
        yield _refused("stage.reference", "must be precomputed", "online")
    for setting in ("stage.neftune_alpha", "stage.router_aux_loss_coef"):
        if mine.get(setting) is not None:
            yield _refused(setting, "must be null", mine[setting])
    for setting in ("data.streaming", "train.profile", "model.resize_vocab"):
        if mine.get(setting):
            yield _refused(setting, "must be false", True)
    if run.tracking.one_a_process:
        yield _refused("tracking", "must be a service that has several runs in a process", run.tracking.name)
    if run.train.eval_tasks:
        yield _refused("train.eval_tasks", "must be empty", run.train.eval_tasks)
    if mine.get("model.new_tokens"):
        yield _refused("model.new_tokens", "must be empty", mine["model.new_tokens"])
    for setting in sorted(mine.keys() | theirs.keys()):
        if mine.get(setting) != theirs.get(setting) and not _varies(setting):
            both = f"{mine.get(setting)} and {theirs.get(setting)}"
            yield ConfigError(
                setting,
                "can't vary where tune.share_base=true: trials see the same packs through one base",
                got=both,
                fix=f"Give it one value. {WAY_OUT}",
            )


def _refused(setting: str, rule: str, got: Any) -> ConfigError:
    return ConfigError(setting, f"{rule} where tune.share_base=true", got=got, fix=WAY_OUT)


def _varies(setting: str) -> bool:
    return setting in OWN or (setting.startswith(VARIES) and setting not in FIXED)
