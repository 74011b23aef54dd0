"""`evaluate`: runs tasks on models, and writes results as JSON, a table and a plot. Models with the same base share an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.plain import as_plain, read_yaml, to_yaml
from raytune_llm.config.run import EvaluateRun
from raytune_llm.engines.questions import Answering
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.evaluate.choices import Choices
from raytune_llm.evaluate.models import Group, groups_of, rendering
from raytune_llm.evaluate.results import (
    PICTURE,
    RESULTS,
    TABLE,
    Scores,
    Shown,
    TaskScores,
    found_results,
    found_scores,
    write_results,
    write_scores,
)
from raytune_llm.predict.answering import EngineSettings, answering
from raytune_llm.runs.contents import adapter_contents, model_contents
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable, owned

OnProgress = Callable[[int, int], None]
"""(number of answered questions, number of all questions)."""
MODELS = "the models"
RUN = "run.yaml"
FILES = (RUN, RESULTS, TABLE, PICTURE)
"""The files of the output folder other than answers."""


@dataclass(frozen=True)
class Evaluated:
    folder: Path
    scores: Scores
    found: bool = False
    """Whether all results existed already, so that nothing was computed."""


class Benchmarks(Protocol):
    """A protocol with its tasks, which are read and checked."""

    shown: Shown

    @property
    def questions(self) -> int:
        """The number of questions of all tasks."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """The protocol's entries in results.json, known once there are answers."""
        ...

    @property
    def contents(self) -> str:
        """A hash of the tasks' files."""
        ...

    def check(self, group: Group) -> None:
        """Called for each group before a model is loaded. Raises UserError for models that can't be evaluated."""
        ...

    def scores(
        self, group: Group, adapter: str | None, answer: Answering, progress: Callable[[int], None], folder: Path
    ) -> TaskScores:
        """The scores of one model. progress: called with the number of newly answered questions. folder: for the answers."""
        ...


def _harness(settings: EvaluateConfig) -> Benchmarks:
    try:
        from raytune_llm.evaluate.harness import Harness  # lm-eval: ten seconds to import
    except ImportError as error:
        raise ResourceError(f"evaluate.protocol=lm_eval needs {error.name}", "pip install 'raytune-llm[harness]'") from None
    return Harness(settings)


PROTOCOLS: dict[str, Callable[[EvaluateConfig], Benchmarks]] = {"llamafactory": Choices, "lm_eval": _harness}


def evaluate(run: EvaluateRun, on_progress: OnProgress = lambda done, total: None) -> Evaluated:
    """Evaluate the models that have no results yet, and write results.json and its pictures. Raises UserError for settings and
    models that can't be evaluated, before one is loaded."""
    assert run.output_dir is not None
    folder = Path(run.output_dir)
    check_writable(folder, *FILES)
    _check_no_run(folder)
    groups = groups_of(run)
    benchmarks = PROTOCOLS[run.evaluate.protocol](run.evaluate)
    made_from = _made_from(run, groups, benchmarks)
    if (found := found_results(folder, made_from)) is not None:
        return Evaluated(folder, found, found=True)
    for group in groups:
        benchmarks.check(group)
    total = benchmarks.questions * sum(len(group.names) for group in groups)
    done = 0

    def progress(answered: int) -> None:
        nonlocal done
        done += answered
        on_progress(done, total)

    engines = [EngineSettings(group.model, run.quantization, run.engine, group.served(run.evaluate)) for group in groups]
    for engine in engines:
        engine.check()
    with owned(folder), full_disk_explained(folder, then="the same command resumes after the models that were asked"):
        write_atomically(folder / RUN, to_yaml(run))
        known = _kept(folder, groups, made_from)
        if known:
            progress(benchmarks.questions * len(known))
        for group, engine in zip(groups, engines, strict=True):
            if left := [(name, adapter) for name, adapter in group.names if name not in known]:
                with answering(engine, run.resources) as answer:
                    for name, adapter in left:
                        place = _answers(folder, name)
                        scores = benchmarks.scores(group, adapter, answer, progress, place)
                        write_scores(place, benchmarks.facts, _of_model(made_from, name), scores)
                        known[name] = benchmarks.facts, scores
        facts, _ = next(iter(known.values()))  # the same for each
        all_scores = {name: known[name][1] for group in groups for name, _ in group.names}
        write_results(folder, facts, made_from, benchmarks.shown, all_scores)
    return Evaluated(folder, all_scores)


def _check_no_run(folder: Path) -> None:
    """Raises ConfigError if the folder's run.yaml is that of a training run."""
    file = folder / RUN
    if file.is_file() and "evaluate" not in read_yaml(file, setting="output_dir"):
        rule = f"must not be the output folder of a run, whose {RUN} an evaluation would replace"
        raise ConfigError("output_dir", rule, got=str(folder), fix=f"For example, output_dir={folder / 'evaluation'}.")


def _answers(folder: Path, name: str) -> Path:
    return folder / "answers" / name


def _kept(folder: Path, groups: Sequence[Group], made_from: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], TaskScores]]:
    """Model -> (the protocol's entry in results.json, its scores), for models that an interrupted evaluation had finished."""
    names = [name for group in groups for name, _ in group.names]
    found = ((name, found_scores(_answers(folder, name), _of_model(made_from, name))) for name in names)
    return {name: one for name, one in found if one is not None}


def _of_model(made_from: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Everything on which one model's scores depend."""
    return {**made_from, MODELS: made_from[MODELS][name]}


def _made_from(run: EvaluateRun, groups: Sequence[Group], benchmarks: Benchmarks) -> dict[str, Any]:
    """Everything on which the scores depend: the contents of files, and all settings except the place of computation."""
    plain = as_plain(run)
    models = {
        name: [model_contents(group.model), adapter and adapter_contents(group.adapters[adapter]), rendering(group.data)]
        for group in groups
        for name, adapter in group.names
    }
    return {
        **{f"evaluate.{name}": value for name, value in plain["evaluate"].items() if name not in ("models", "data")},
        "quantization": plain["quantization"],
        "engine": plain["engine"]["name"],
        MODELS: models,
        "the tasks": benchmarks.contents,
    }
