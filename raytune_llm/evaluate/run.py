"""`evaluate`: tasks by models, those of one base side by side on one engine; results as JSON, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raytune_llm.config.evaluate import EvaluateConfig
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.run import EvaluateRun
from raytune_llm.engines.questions import Answering
from raytune_llm.errors import ConfigError, ResourceError
from raytune_llm.evaluate.choices import Choices
from raytune_llm.evaluate.models import Group, groups_of
from raytune_llm.evaluate.results import Scores, Shown, TaskScores, write_results
from raytune_llm.predict.answering import EngineSettings, answering
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable, owned

OnProgress = Callable[[int, int], None]
"""Called with the questions that are answered and those in all."""
FILES = ("run.yaml", "results.json", "results.md", "results.png")
"""What the output folder gets beside the answers."""


@dataclass(frozen=True)
class Evaluated:
    folder: Path
    scores: Scores


class Benchmarks(Protocol):
    """The tasks of a protocol, read and checked."""

    shown: Shown

    @property
    def questions(self) -> int:
        """In all tasks."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What results.json says of the protocol, when the answers are there."""
        ...

    def check(self, group: Group) -> None:
        """Called for each group before a model is loaded. Raises UserError for models that can't be asked."""
        ...

    def scores(
        self, group: Group, adapter: str | None, answer: Answering, progress: Callable[[int], None], folder: Path
    ) -> TaskScores:
        """One model's. progress: how many more questions are answered. folder: gets the answers."""
        ...


def _harness(settings: EvaluateConfig) -> Benchmarks:
    try:
        from raytune_llm.evaluate.harness import Harness  # lm-eval: ten seconds to import
    except ImportError as error:
        raise ResourceError(f"evaluate.protocol=lm_eval needs {error.name}", "pip install 'raytune-llm[harness]'") from None
    return Harness(settings)


PROTOCOLS: dict[str, Callable[[EvaluateConfig], Benchmarks]] = {"llamafactory": Choices, "lm_eval": _harness}


def evaluate(run: EvaluateRun, on_progress: OnProgress = lambda done, total: None) -> Evaluated:
    assert run.output_dir is not None
    folder = Path(run.output_dir)
    check_writable(folder, *FILES)
    if (folder / "results.json").exists():
        fix = "Choose another one, or remove results.json."
        raise ConfigError("output_dir", "must hold no results of an earlier evaluation", got=str(folder), fix=fix)
    groups = groups_of(run)
    benchmarks = PROTOCOLS[run.evaluate.protocol](run.evaluate)
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
    with owned(folder), full_disk_explained(folder):
        (folder / "run.yaml").write_text(to_yaml(run))
        scores: dict[str, TaskScores] = {}
        for group, engine in zip(groups, engines, strict=True):
            with answering(engine, run.resources) as answer:
                for name, adapter in group.names:
                    scores[name] = benchmarks.scores(group, adapter, answer, progress, folder / "answers" / name)
        write_results(folder, benchmarks.facts, benchmarks.shown, scores)
    return Evaluated(folder, scores)
