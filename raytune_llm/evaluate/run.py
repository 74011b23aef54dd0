"""`evaluate`: tasks by models, those of one base side by side on one engine; results as JSON, as a table and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_llm.config.load import load_config, to_yaml
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.run import EvaluateRun
from raytune_llm.errors import ConfigError
from raytune_llm.evaluate.choices import AVERAGE, Score, Task, answer_task, questions_of, scores_of, tasks_of
from raytune_llm.predict.answering import EngineSettings, answering
from raytune_llm.predict.models import check_writes, served_with
from raytune_llm.predict.rows import ConversationPrompts
from raytune_llm.report.plots import save
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable, owned
from raytune_llm.runs.trained import Trained, read_trained

OnProgress = Callable[[int, int], None]
"""Called with the questions that are answered and those in all."""
Scores = Mapping[str, Mapping[str, Mapping[str, Score]]]
"""By model, task and category."""


@dataclass(frozen=True)
class Evaluated:
    folder: Path
    scores: Scores


@dataclass
class Group:
    """Models on one engine."""

    model: ModelConfig
    prompts: ConversationPrompts
    template: str | None
    adapters: dict[str, str]
    with_base: str | None
    """The name by which the model itself is evaluated."""

    @property
    def names(self) -> list[tuple[str, str | None]]:
        """What a result is called, and the adapter that makes it."""
        base: list[tuple[str, str | None]] = [] if self.with_base is None else [(self.with_base, None)]
        return [*base, *((name, name) for name in self.adapters)]


def evaluate(run: EvaluateRun, on_progress: OnProgress = lambda done, total: None) -> Evaluated:
    assert run.output_dir is not None
    folder, settings = Path(run.output_dir), run.evaluate
    check_writable(folder)
    if (folder / "results.json").exists():
        fix = "Choose another one, or remove results.json."
        raise ConfigError("output_dir", "must hold no results of an earlier evaluation", got=str(folder), fix=fix)
    tasks = tasks_of(settings)
    groups = _groups(run)
    total = sum(len(questions_of(subject, settings)) for task in tasks for subject in task.subjects)
    total *= sum(len(group.names) for group in groups)
    done = 0

    def told(answered: int) -> None:
        nonlocal done
        done += answered
        on_progress(done, total)

    with owned(folder), full_disk_explained(folder):
        (folder / "run.yaml").write_text(to_yaml(run))
        scores: dict[str, dict[str, dict[str, Score]]] = {}
        for group in groups:
            served = served_with(
                group.adapters,
                max_rank=None,
                precision=settings.precision,
                max_length=settings.max_length,
                template=group.template,
            )
            engine = EngineSettings(group.model, run.quantization, run.engine, served)
            with answering(engine, run.resources) as answer:
                for name, adapter in group.names:
                    for task in tasks:
                        letters = answer_task(task, settings, group.prompts, adapter, answer, told)
                        _write_letters(folder / "answers" / name / f"{task.name}.json", letters)
                        scores.setdefault(name, {})[task.name] = scores_of(task, letters, settings)
        _write_results(folder, run, tasks, scores)
    return Evaluated(folder, scores)


def _groups(run: EvaluateRun) -> list[Group]:
    """Raises ConfigError for what is no run, writes no text, or has the name of another one."""
    settings = run.evaluate
    if not settings.models:
        name = Path(str(run.model.path or "model")).name
        return [Group(run.model, _prompts(run, None), settings.template, {}, name)]
    groups: list[Group] = []
    names: set[str] = set()
    for place in settings.models:
        trained = read_trained(place, "evaluate.models")
        if trained.name in names:
            rule = f"must hold runs of different names: {trained.name} comes twice"
            raise ConfigError("evaluate.models", rule, got=settings.models)
        names.add(trained.name)
        if trained.adapter is None:
            groups.append(Group(trained.model, _prompts(run, trained), _template(run, trained), {}, trained.name))
            continue
        check_writes(str(trained.adapter), "evaluate.models")
        key = (trained.model, _template(run, trained), trained.run.data.default_system)
        alike = (one for one in groups if one.adapters and (one.model, one.template, one.prompts.default_system) == key)
        group = next(alike, None)
        if group is None:
            base = Path(str(trained.model.path)).name if settings.base else None
            group = Group(trained.model, _prompts(run, trained), _template(run, trained), {}, base)
            groups.append(group)
        group.adapters[trained.name] = str(trained.adapter)
    return groups


def _template(run: EvaluateRun, trained: Trained) -> str | None:
    return run.evaluate.template or trained.run.data.template


def _prompts(run: EvaluateRun, trained: Trained | None) -> ConversationPrompts:
    """Written as in the run, or as in a run of the model's own template."""
    if trained is None:
        plain = load_config("prepare", ["model=_base", "model.path=none", "data.path=none"]).data
        return ConversationPrompts(run.model, replace(plain, template=run.evaluate.template))
    return ConversationPrompts(trained.model, replace(trained.run.data, template=_template(run, trained)))


def _write_letters(path: Path, letters: Mapping[str, Sequence[str]]) -> None:
    """As LLaMA-Factory writes them: of each subject, the answers by the questions' numbers from 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = {subject: {str(number): letter for number, letter in enumerate(found)} for subject, found in letters.items()}
    path.write_text(json.dumps(numbered, indent=2) + "\n")


def _write_results(folder: Path, run: EvaluateRun, tasks: Sequence[Task], scores: Scores) -> None:
    settings = run.evaluate
    results: dict[str, Any] = {
        "protocol": settings.protocol,
        "shots": settings.shots,
        "models": {
            model: {task: {name: score.to_json() for name, score in of_task.items()} for task, of_task in of_model.items()}
            for model, of_model in scores.items()
        },
    }
    (folder / "results.md").write_text(_table(settings.protocol, settings.shots, tasks, scores))
    _plot(folder / "results.png", tasks, scores)
    beside = folder / ".results.json-new"
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    beside.rename(folder / "results.json")


def _table(protocol: str, shots: int, tasks: Sequence[Task], scores: Scores) -> str:
    """Percentages with their standard errors."""
    lines = [f"Protocol `{protocol}`, {shots} shots. Percent of the questions answered rightly, and the standard error.", ""]
    for task in tasks:
        columns = [name for name in dict.fromkeys(name for one in scores.values() for name in one[task.name]) if "/" not in name]
        lines += [f"| {task.name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for model, of_model in scores.items():
            cells = [_cell(of_model[task.name].get(column)) for column in columns]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{100 * score.score:.2f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.2f}")


def _plot(path: Path, tasks: Sequence[Task], scores: Scores) -> None:
    """The averages with their standard errors."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(1.5 + 1.2 * len(tasks) * len(scores), 3), dpi=200, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for place, (model, of_model) in enumerate(scores.items()):
        found = [of_model[task.name].get(AVERAGE) for task in tasks]
        heights = [0.0 if one is None else 100 * one.score for one in found]
        errors = [0.0 if one is None else 100 * (one.stderr or 0.0) for one in found]
        axes.bar([number + place * width for number in range(len(tasks))], heights, width, yerr=errors, label=model)
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(tasks))], [task.name for task in tasks])
    axes.set(ylabel="% right")
    axes.legend()
    save(figure, path)
