"""`train`: what a run prints, from its progress line to the commands that may follow it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from raytune_llm import BEGAN, api
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.override_syntax import as_word
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.run import TrainRun
from raytune_llm.packaged import PACKAGED
from raytune_llm.report.display import SHOWN_SAMPLES, Display, last_line
from raytune_llm.report.events import EventLog
from raytune_llm.report.metrics import METRICS, TABLE, TRACE, read_metrics
from raytune_llm.report.updates import Notice, RunFinished
from raytune_llm.runs.remote_output import work_folder

HELD_OUT = {
    "eval_loss": ("loss, held out", "{:.4f}"),
    "eval_rewards/margins": ("margin, held out", "{:.3g}"),
    "eval_rewards/accuracies": ("better one right, held out", "{:.1%}"),
    "eval_accuracy": ("better one right, held out", "{:.1%}"),
}
"""Metrics of evaluations that the terminal shows at the end: metric -> its title and format."""


def main(run: TrainRun) -> int:
    display = DISPLAYS[run.log_format]()
    display.run(run.name, _description(run), to_yaml(run))
    try:
        result = api.train(
            run,
            sinks=[display.record],
            on_update=display.update,
            on_samples=display.samples,
            on_progress=display.rows,
            began=BEGAN,
        )
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(how_to_resume(work_folder(run.output_dir)))
        raise
    finally:
        display.close()
    if result.paused:
        display.update(
            Notice(text=f"paused at step {result.summary.steps}: the same command without train.pause_at resumes from there")
        )
        return 0
    display.done(_done(run, result))
    return 0


def how_to_resume(output: Path) -> str:
    """Says what the same command will do after this one was interrupted."""
    steps = [mark.parent.name.removeprefix("step-") for mark in (output / "checkpoints").glob("step-*/COMPLETE")]
    newest = max((int(step) for step in steps if step.isdigit()), default=None)
    if newest is None:
        return "nothing was saved yet: the same command begins again"
    return f"the same command resumes from the checkpoint at step {newest}"


DISPLAYS: dict[str, Callable[[], Display | EventLog]] = {"text": lambda: Display(Console()), "json": EventLog}
"""By log_format."""


def _description(run: TrainRun) -> str:
    return (
        f"{run.stage.name} of {run.model.path or run.model.config.get('model_type')}, "
        f"adapter {run.adapter.option}, strategy {run.strategy.option}, resources {run.resources.name}"
    )


def _done(run: TrainRun, result: api.TrainResult) -> RunFinished:
    metrics, table = result.output_dir / METRICS, result.output_dir / TABLE
    profile = None
    if run.train.profile and table.exists():
        profile = f"a step, by kind of work ({result.output_dir / TRACE} for a viewer)\n{table.read_text()}"
    answers = []
    if result.before is not None and result.after is not None:
        answers = [
            {
                "asked": last_line(old.prompt),
                "expected": new.reference,
                "before": old.answer,
                "after": new.answer,
                "right": new.correct,
            }
            for old, new in list(zip(result.before.samples, result.after.samples, strict=True))[:SHOWN_SAMPLES]
        ]
    return RunFinished(
        summary=result.summary,
        output_dir=str(result.output_dir),
        already_done=result.already_done,
        held_out=held_out_figures(read_metrics(metrics) if metrics.exists() else []),
        answers=answers,
        profile=profile,
        next_commands=[
            command for make in (chat_command, next_command, merge_command) if (command := make(run, result.final)) is not None
        ],
    )


def held_out_figures(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The titles and figures of the last evaluation: `before -> after` if there was also one before the first step."""
    evaluations = [record for record in records if "eval_loss" in record]
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    before = first if first["step"] == 0 and first is not last else {}
    if before.get("eval_rewards/margins") == 0:  # a policy that is its own reference prefers neither answer
        before = {name: value for name, value in before.items() if name != "eval_rewards/accuracies"}
    return [
        (title, " -> ".join(form.format(record[name]) for record in (before, last) if name in record))
        for name, (title, form) in HELD_OUT.items()
        if name in last
    ]


def next_command(run: TrainRun, final: Path) -> str | None:
    """The command that trains further from this run. None for a reward model, or for plain text without a chat template."""
    if not run.stage.writes or (run.adapter.changes_base and not run.adapter.trains_base):
        return None  # saved as a plain LoRA on the original base, which this config would not continue
    there = _override("output_dir", f"{final.parent}_next")
    if run.stage.plain_text:
        if not (final / "chat_template.jinja").exists():
            return None
        model = _base(run.model, final) if run.adapter.trains_base else _base(run.model, run.model.path)
        adapter = [] if run.adapter.trains_base else [_override("adapter.path", final)]
        return " ".join(["python -m raytune_llm", *model, *adapter, "data=commands", there])
    words = ["python -m raytune_llm --config-dir", shlex.quote(str(final.parent)), "--config-name run"]
    if run.adapter.trains_base:
        words += [_override("model.path", final)]
        words += ["model.weights=pretrained"] if run.model.weights != "pretrained" else []
        words += [f"~model.config.{name}" for name in run.model.config]
        words += ["model.merged_adapters=[]"] if run.model.merged_adapters else []
    else:
        words += [_override("adapter.path", final)]
    return " ".join([*words, there])


def merge_command(run: TrainRun, final: Path) -> str | None:
    """The command that exports the base of an adapter, if others were merged into it: other programs need that model as a
    folder."""
    if run.adapter.trains_base or not run.model.merged_adapters or run.model.path is None or run.model.config:
        return None
    place = _override("export.output_dir", f"{final.parent}_base")
    return " ".join(["python -m raytune_llm export", *_base(run.model, run.model.path), place])


def _base(model: ModelConfig, path: object) -> list[str]:
    """Overrides that select the model at `path`, with the run's own tokenizer, revision and merged adapters."""
    option = next((package.option for known, package in PACKAGED.items() if known == path), None)
    words = [option] if option else ["model=hub", _override("model.path", path)]
    revision = model.revision if path == model.path else None
    merged = model.merged_adapters if path == model.path else []
    given = {
        "revision": revision,
        "merged_adapters": merged or None,
        "tokenizer": model.tokenizer,
        "trust_remote_code": model.trust_remote_code or None,
    }
    return [*words, *(_override(f"model.{name}", value) for name, value in given.items() if value is not None)]


def chat_command(run: TrainRun, final: Path) -> str | None:
    """The `chat` command for the run's result. None for a reward model, a model without a chat template, an adapter that can't be
    served, or a base that exists in no file."""
    model, adapter = run.model, run.adapter
    if not run.stage.writes or not (final / "chat_template.jinja").exists():
        return None
    if adapter.trains_base:
        trusted = ["model.trust_remote_code=true"] if model.trust_remote_code else []
        return " ".join(["python -m raytune_llm chat model=hub", _override("model.path", final), *trusted])
    if not adapter.mixes or model.path is None or model.weights == "random" or model.config:
        return None
    words = _base(model, model.path)
    words += [f"quantization={run.quantization.name}"] if run.quantization.replaces_layers else []
    words += [_override("chat.template", run.data.template)] if run.data.template is not None else []
    return " ".join(["python -m raytune_llm chat", *words, _override("chat.adapter", final)])


def _override(setting: str, value: object) -> str:
    return shlex.quote(as_word(setting, str(value) if isinstance(value, Path) else value))
