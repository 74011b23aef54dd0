"""Evaluations, checkpoints, trackers and the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raytune_llm.migrate.argument_rules import Refusal, Settings
from raytune_llm.migrate.rules.values import listed, whole_steps_of


def resume(resume_from_checkpoint: str | bool | None) -> str:
    if isinstance(resume_from_checkpoint, str):
        raise Refusal("checkpoints of LLaMA-Factory can't be resumed; adapter_name_or_path continues a trained adapter")
    return "must" if resume_from_checkpoint else "auto"


def evaluation(eval_strategy: str, eval_steps: float | None, logging_steps: float) -> Settings:
    """There, every logging_steps where eval_steps is not given."""
    if eval_strategy != "steps":
        return {"train.eval_every_steps": None}
    return {"train.eval_every_steps": whole_steps_of(logging_steps if eval_steps is None else eval_steps, "eval_steps")}


def checkpoints(save_strategy: str, save_steps: float, save_total_limit: int | None) -> Settings:
    if save_strategy == "best":
        raise Refusal("set load_best_model_at_end, which keeps the best state too", "save_strategy")
    every = whole_steps_of(save_steps, "save_steps") if save_strategy == "steps" else None
    settings: dict[str, Any] = {"checkpoint.every_steps": every}
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
    wanted = {name for name in ([] if report_to is None else listed(report_to)) if name != "none"}
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
