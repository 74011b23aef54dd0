"""One function per command: it takes the config and returns a typed result. The command line only calls these.

from raytune_llm import api, load_config
result = api.train(load_config("train", ["+experiment=sft_smollm2"]))
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_llm import packaged, session
from raytune_llm.atomic_file import write_atomically
from raytune_llm.config import command_line
from raytune_llm.config.paths import expanded, value_of, with_absolute_paths
from raytune_llm.config.plain import as_plain, to_yaml
from raytune_llm.config.resources import Cluster, on_cluster, uses_ray
from raytune_llm.config.run import (
    ChainRun,
    ChatRun,
    DoctorRun,
    EvaluateRun,
    ExportRun,
    ImportRun,
    PredictRun,
    PrepareRun,
    ServeRun,
    SubmitRun,
    TrainRun,
)
from raytune_llm.data import pipeline
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.pipeline import Prepared, Streamed
from raytune_llm.data.readers.declarations import check_held_out
from raytune_llm.evaluate.exact_match import ExactMatch
from raytune_llm.head_watch import ends_without_head
from raytune_llm.migrate.experiment import translate_file, write
from raytune_llm.report.metrics import Sink, Summary, WallTime, read_metrics, summary_of, write_summary
from raytune_llm.report.slow import notify_if_slow
from raytune_llm.report.trackers import TrackedRun, open_tracker
from raytune_llm.report.updates import Notice

if TYPE_CHECKING:
    from raytune_llm.chat.dialogue import Dialogue
    from raytune_llm.cluster.jobs import Job
    from raytune_llm.config.sweep import SubmittedSweep, Sweep
    from raytune_llm.doctor import Doctor
    from raytune_llm.evaluate.run import Evaluated
    from raytune_llm.export.run import Exported
    from raytune_llm.predict.run import Predicted
    from raytune_llm.runs.outcome import TrainOutcome
    from raytune_llm.runs.plan import Plan
    from raytune_llm.runs.together import Part
    from raytune_llm.runs.workspace import Workspace
    from raytune_llm.tune.run import OnChange, TuneResult


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    summary: Summary
    output_dir: Path
    resumed_from: int | None
    """The step that training resumed from."""
    already_done: bool
    """The output folder already had the finished run, and nothing was computed."""
    before: ExactMatch | None
    after: ExactMatch | None
    paused: bool = False
    """The run stopped at train.pause_at: the folder has a checkpoint and no final/."""

    @property
    def final(self) -> Path:
        """The adapter or the model."""
        return self.output_dir / "final"


@ends_without_head("resumes from the finished shards")
def prepare(run: PrepareRun, *, on_progress: pipeline.OnProgress | None = None) -> Prepared:
    """The token stores of a run, which are created unless they exist."""
    check_held_out(run.data, ranked=KINDS[run.stage.kind].ranked)
    kind, resources = run.stage.kind, run.resources

    @cache
    def check() -> None:
        from raytune_llm.runs.nodes import check_nodes

        if on_cluster(resources):
            folders = {"data.cache": with_absolute_paths(run).data.cache}
            check_nodes(resources, folders, workers=1, each={"CPU": 1.0}, report=lambda line: None)

    return pipeline.prepare(run.model, run.data, resources, kind=kind, on_progress=on_progress, check_cluster=check)


@ends_without_head("resumes from the newest checkpoint")
def train(
    run: TrainRun,
    *,
    sinks: Sequence[Sink] = (),
    on_update: Callable[[Any], None] = lambda update: None,
    on_samples: Callable[[Any], None] = lambda samples: None,
    on_progress: pipeline.OnProgress | None = None,
    began: float | None = None,
    workspace: Workspace | None = None,
) -> TrainResult:
    """Create the token stores if they are missing (with data.streaming, while training), train or resume, and write the output
    folder.

    Callbacks: sinks get every record of metrics.jsonl. on_update gets a `report.updates.RunStarted` before the first step and
    again whenever lost workers were replaced, and in between each ReferencePass and Notice. on_samples gets a list of
    `report.updates.SampledAnswer` at each evaluation. on_progress gets the numbers of rows that are prepared and of all rows.
    began: when the command started, in seconds since 1970. workspace: what earlier runs of this process left for this one.
    """
    from raytune_llm.runs.remote_output import check_writable, owned

    clock = _Phases(began or time.time())
    run = with_absolute_paths(run)
    check_writable(run.output_dir)
    workspace = _start(run, workspace)
    from raytune_llm.runs.output import as_found_where_refused, full_disk_explained  # torch is loaded by now

    def notify(line: str) -> None:
        on_update(Notice(text=line))

    with (
        owned(run.output_dir, anew=run.resume == "never", notify=notify) as output,
        full_disk_explained(output),
        as_found_where_refused(output),
    ):
        return _train(run, output, clock, sinks, on_update, on_samples, on_progress, workspace)


def _train(
    run: TrainRun,
    output: Path,
    clock: _Phases,
    sinks: Sequence[Sink],
    on_update: Callable[[Any], None],
    on_samples: Callable[[Any], None],
    on_progress: pipeline.OnProgress | None,
    workspace: Workspace,
) -> TrainResult:
    from raytune_llm.runs.group_size import spare_cpus
    from raytune_llm.runs.launch import fit
    from raytune_llm.runs.output import check_final
    from raytune_llm.runs.remote_output import collect, remote_folder

    check_final(run, output)
    if on_cluster(run.resources):
        _check_nodes(run, run.resources, on_update)
    clock.enter("prepare")
    if run.data.streaming:
        prepared = pipeline.stream(run.model, run.data, run.resources, kind=run.stage.kind)
    else:
        prepared = _prepared(run, workspace, on_progress, on_update)
    opened = _opened(run, output, prepared, clock, on_update, workspace)
    if opened.done is not None:
        return opened.done
    with opened.tracking() as tracker, prepared.making(max_tasks=spare_cpus(run)):
        outcome = fit(
            run,
            *prepared.places,
            sinks=[*sinks, tracker],
            on_update=on_update,
            on_samples=on_samples,
            workspace=workspace,
        )
    if on_cluster(run.resources) and (remote := remote_folder(run.output_dir)) is not None:
        collect(remote, output)
    return _closed(opened, outcome, on_update, workspace)


def train_together(parts: Sequence[Part], *, workspace: Workspace | None = None) -> list[TrainResult | Exception | None]:
    """Train several adapters on one base and the same packs, in one forward pass per step (config/sharing.py has the rules).

    Each run has an output folder like that of `train`, and resumes from it. Returns, in the order of the parts, a result, the
    error that ended the run, or None if its `stops` did.
    """
    from raytune_llm.runs.output import check_final
    from raytune_llm.runs.owner import check_writable, owned
    from raytune_llm.runs.remote_output import FILES, FOLDERS
    from raytune_llm.runs.together import fit_together
    from raytune_llm.runs.workspace import Workspace

    workspace = workspace or Workspace()
    parts = [replace(part, run=with_absolute_paths(part.run)) for part in parts]
    with ExitStack() as stack:
        clocks = [_Phases(time.time()) for _ in parts]
        for part in parts:
            check_writable(Path(part.run.output_dir), *FILES, folders=FOLDERS)
            stack.enter_context(owned(Path(part.run.output_dir)))
            check_final(part.run, Path(part.run.output_dir))
        for clock in clocks:
            clock.enter("prepare")
        prepared = _prepared(parts[0].run, workspace, None, parts[0].on_update)
        opened = [
            _opened(part.run, Path(part.run.output_dir), prepared, clock, part.on_update, workspace)
            for part, clock in zip(parts, clocks, strict=True)
        ]
        left = [number for number, one in enumerate(opened) if one.done is None]
        results: list[TrainResult | Exception | None] = [one.done for one in opened]
        if not left:
            return results
        with ExitStack() as trackers:
            tracked = [
                replace(parts[number], sinks=[*parts[number].sinks, trackers.enter_context(opened[number].tracking())])
                for number in left
            ]
            outcomes = fit_together(tracked, *prepared.places, workspace=workspace)
        for number, outcome in zip(left, outcomes, strict=True):
            if outcome is None or isinstance(outcome, Exception):
                results[number] = outcome
                continue
            try:
                results[number] = _closed(opened[number], outcome, parts[number].on_update, workspace)
            except Exception as error:
                results[number] = error
        return results


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A run that is ready for training."""

    run: TrainRun
    output: Path
    prepared: Prepared | Streamed
    identity: dict[str, str]
    resumed_from: int | None
    done: TrainResult | None
    """The result, if the folder has the finished run."""
    before: ExactMatch | None
    clock: _Phases

    @contextmanager
    def tracking(self) -> Iterator[Sink]:
        run, from_step = self.run, self.resumed_from or 0
        tracked = TrackedRun(name=run.name, output_dir=self.output, from_step=from_step, settings=as_plain(run))
        tracker = open_tracker(run.tracking, tracked)
        try:
            yield tracker
        finally:
            tracker.close()


def _prepared(
    run: TrainRun, workspace: Workspace, on_progress: pipeline.OnProgress | None, on_update: Callable[[Any], None]
) -> Prepared:
    kind = run.stage.kind

    def made() -> Prepared:
        with notify_if_slow(on_update, "preparing rows") as preparing:

            def progress(done: int, total: int) -> None:
                preparing.of(done, total)
                if on_progress is not None:
                    on_progress(done, total)

            return pipeline.prepare(run.model, run.data, run.resources, kind=kind, on_progress=progress)

    return workspace.once("stores", (run.model, run.data, kind), made)


def _opened(
    run: TrainRun,
    output: Path,
    prepared: Prepared | Streamed,
    clock: _Phases,
    on_update: Callable[[Any], None],
    workspace: Workspace,
) -> _Opened:
    from raytune_llm.runs.output import finished, identity, open_output
    from raytune_llm.runs.remote_output import clear
    from raytune_llm.runs.stores import check_split

    clock.enter("start")
    if isinstance(prepared, Prepared):
        check_split(run, prepared.store)
    this_run = identity(run, prepared.manifests)
    done = _summary_of(output) if run.resume != "never" and finished(run, output, this_run) else None
    resumed_from = open_output(run, output, this_run)
    if run.resume == "never":
        clear(run.output_dir)
    opened = _Opened(
        run=run,
        output=output,
        prepared=prepared,
        identity=this_run,
        resumed_from=resumed_from,
        done=done
        and TrainResult(summary=done, output_dir=output, resumed_from=resumed_from, already_done=True, before=None, after=None),
        before=None,
        clock=clock,
    )
    if done is not None:
        return opened
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "run.yaml", to_yaml(run))
    clock.enter("evaluate")
    answered = (run.train.exact_match_rows, run.train.max_new_tokens, run.train.precision, run.train.seed)
    before = workspace.once(
        "answered by the base",
        (run.model, run.data, run.quantization, answered, prepared.folder),
        lambda: _exact_match(run, prepared, None, on_update, workspace),
    )
    clock.enter("fit")
    return replace(opened, before=before)


def _closed(opened: _Opened, outcome: TrainOutcome, on_update: Callable[[Any], None], workspace: Workspace) -> TrainResult:
    """Write what follows the last step or a pause: loss curve, exact match, summary."""
    from raytune_llm.report.plots import loss_curve
    from raytune_llm.runs.output import mark_finished

    run, output, clock = opened.run, opened.output, opened.clock
    result = partial(TrainResult, output_dir=output, resumed_from=opened.resumed_from, already_done=False, before=opened.before)
    if outcome.paused:
        clock.enter("save")
        return result(summary=_summary(outcome, clock, opened.before, None), after=None, paused=True)
    clock.enter("evaluate")
    after = _exact_match(run, opened.prepared, output / "final", on_update, workspace)
    clock.enter("save")
    loss_curve(read_metrics(output / "metrics.jsonl"), output / "loss.png", title=run.name)
    summary = _summary(outcome, clock, opened.before, after)
    write_summary(output / "summary.json", summary)
    mark_finished(output, opened.identity)
    return result(summary=summary, after=after)


def _start(run: TrainRun, workspace: Workspace | None) -> Workspace:
    """Check the run and connect to Ray, if it uses Ray, at the same time. Each takes seconds: importing torch and building the
    model without weights, and starting Ray's processes."""
    with ThreadPoolExecutor(1, "preflight") as beside:
        checked = beside.submit(_preflight, run, workspace)
        if uses_ray(run.resources):
            beside.submit(import_module, "raytune_llm.runs.group_trainer")  # Ray Train, which takes its second here, too
            session.connect(run.resources)
        return checked.result()


def _preflight(run: TrainRun, workspace: Workspace | None) -> Workspace:
    from raytune_llm.runs import preflight
    from raytune_llm.runs.workspace import Workspace

    workspace = workspace or Workspace()
    preflight.check(run, workspace)
    return workspace


def _check_nodes(run: TrainRun, resources: Cluster, on_update: Callable[[Any], None]) -> None:
    from raytune_llm.runs.group_size import group_size, most_workers
    from raytune_llm.runs.nodes import check_nodes

    size = group_size(resources)
    check_nodes(
        resources,
        {"output_dir": run.output_dir, "data.cache": run.data.cache},
        workers=most_workers(resources, size),
        each=size.each,
        report=lambda line: on_update(Notice(text=line)),
    )


def plan(run: TrainRun, *, in_sweep: bool = False) -> Plan:
    """The steps, tokens, parameters and memory of a run, and settings that would not work. Nothing is trained or written.
    in_sweep: of a trial, beside others over the same base."""
    from raytune_llm.runs.plan import plan

    return plan(run, in_sweep=in_sweep)


@ends_without_head("resumes the sweep")
def tune(
    sweep: Sweep,
    *,
    on_change: OnChange = lambda study, trial: None,
    notify: Callable[[str], None] = lambda line: None,
) -> TuneResult:
    """Run a sweep, or what is left of it, and write its folder. on_change is called when a trial begins, reports or ends; notify
    gets a line where trials share a base.

    from raytune_llm import api, load_sweep
    result = api.tune(load_sweep(["+experiment=sft_smollm2", "adapter.rank=8,16", "tune=grid"]))
    result.best.point, result.best.value, result.folder
    """
    from raytune_llm.tune.run import run_sweep

    return run_sweep(sweep, train, on_change, train_together=train_together, notify=notify)


def products_per_s() -> float:
    """FLOP/s of matrix products on this machine, measured now."""
    from raytune_llm.memory.flops import measured_flops

    return measured_flops()


def import_(run: ImportRun) -> Path:
    """Translate a LLaMA-Factory training file to an experiment. Returns the path of the written file."""
    return write(run, translate_file(run))


@ends_without_head("starts the server again")
def serve(run: ServeRun, *, notify: Callable[[str], None] = lambda line: None) -> None:
    """Serve a model and its adapters until interrupted. notify: called with one line of text at each stage of the start."""
    from raytune_llm.serve.extra import check_extra

    run = with_absolute_paths(run)
    if run.engine.notice is not None:
        notify(run.engine.notice)
    check_extra("serve")
    if not uses_ray(run.resources):
        from raytune_llm.serve.inprocess import serve_inline

        serve_inline(run, notify=notify)
        return
    from raytune_llm.serve import onray

    if run.serve.write is not None:
        onray.write(run, notify=notify)
    else:
        onray.serve_on_ray(run, notify=notify)


def chat(run: ChatRun) -> AbstractContextManager[Dialogue]:
    """A conversation with a model of this process, or with a server's:

    with api.chat(load_config("chat", ["model=smollm2_135m"])) as dialogue:
        dialogue.say("hello")
        for piece in dialogue.ask(Answer()):
            print(piece.text, end="")
    """
    from raytune_llm.chat.open import open_dialogue

    return open_dialogue(with_absolute_paths(run))


@ends_without_head("answers the rest")
def predict(run: PredictRun, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Predicted:
    """Answers for a data set, written as they are generated, and their metrics. Answers in the output folder are kept.

    from raytune_llm import api, load_config
    predicted = api.predict(load_config("predict", ["predict.run=outputs/x", "data.path=rows.jsonl", "output_dir=out"]))
    predicted.metrics["x"]["exact_match"]
    """
    from raytune_llm.predict.run import predict

    return predict(with_absolute_paths(run), on_progress)


@ends_without_head("starts over")
def export(run: ExportRun, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Exported:
    """Write a merged model, and compare it with the base and adapters. on_progress(bytes written, bytes in total)."""
    from raytune_llm.export.run import export

    return export(with_absolute_paths(run), on_progress)


@ends_without_head("resumes after the models that were asked")
def evaluate(run: EvaluateRun, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Evaluated:
    """Benchmark one or several models, and write results.json, results.md and results.png. on_progress(questions answered,
    questions in total)."""
    from raytune_llm.evaluate.run import evaluate

    return evaluate(with_absolute_paths(run), on_progress)


def chain(run: ChainRun, *, each: Callable[[str, str, Any], Any] | None = None) -> dict[str, Any]:
    """Run commands one after another, and return what each returned, by the steps' names.

    All their settings are checked before the first one runs, and the places and packages of exports. each(name, verb, run) runs
    one; without it, this module's function of the verb does. Repeated, it resumes: a finished training or evaluation is not run
    again, and predictions are kept.
    """
    runs = {}
    for name in run.steps:
        verb, *words = run.words(name)
        runs[name] = (verb, command_line.load(command_line.parse(verb, words)))
    made: list[Path] = []
    trained: dict[str, TrainRun] = {}
    for _, step in runs.values():
        if isinstance(step, TrainRun | PrepareRun | PredictRun | ExportRun | EvaluateRun):
            packaged.check_models(step, made)
        if isinstance(step, ExportRun):
            from raytune_llm.export.run import check_ahead

            check_ahead(with_absolute_paths(step), trained)
        if isinstance(step, TrainRun) and not packaged.is_made(step.model.path, made):
            trained[str(expanded(step.output_dir).absolute())] = with_absolute_paths(step)
        place = step.export.output_dir if isinstance(step, ExportRun) else value_of(step, "output_dir")
        if place is not None:
            made.append(expanded(place).absolute())
    own = {"prepare": prepare, "train": train, "tune": tune, "predict": predict, "evaluate": evaluate, "export": export}
    return {name: own[verb](step) if each is None else each(name, verb, step) for name, (verb, step) in runs.items()}


def submit(run: SubmitRun | SubmittedSweep) -> Job:
    """Submit a run or a sweep to a cluster as a job; raytune_llm.cluster.jobs.Jobs follows it."""
    from raytune_llm.cluster.submit import submit

    return submit(run)


def doctor(run: DoctorRun) -> Doctor:
    """The hardware and packages of this machine, and which features lack something."""
    from raytune_llm.doctor import doctor

    return doctor()


class _Phases:
    """Wall time by phase."""

    def __init__(self, began: float) -> None:
        self.began = self._since = began
        self.seconds: dict[str, float] = {}
        self._phase = "start"

    def enter(self, phase: str) -> None:
        now = time.time()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def total(self) -> float:
        self.enter(self._phase)
        return time.time() - self.began


def _summary(outcome: TrainOutcome, clock: _Phases, before: ExactMatch | None, after: ExactMatch | None) -> Summary:
    progress = outcome.progress
    total = clock.total()
    fit_s = clock.seconds["fit"]
    return Summary(
        loss_first=progress.loss_first,
        loss_last=progress.loss_last,
        exact_match_before=before and before.fraction,
        exact_match_after=after and after.fraction,
        steps=progress.step,
        tokens=progress.tokens_seen,
        tokens_per_s=outcome.tokens_per_s,
        mfu=outcome.mfu,
        peak_memory_gib=outcome.peak_memory_gib,
        world_size=outcome.world_size,
        wall_s=WallTime(
            # What a group of workers needs to come up and go down is part of starting.
            start=clock.seconds["start"] + fit_s - outcome.load_s - outcome.train_s - outcome.save_s,
            prepare=clock.seconds["prepare"],
            load=outcome.load_s,
            train=outcome.train_s,
            save=outcome.save_s + clock.seconds["save"],
            total=total,
            evaluate=clock.seconds["evaluate"],
        ),
    )


def _summary_of(output: Path) -> Summary:
    """The result of a run that its folder has finished."""
    return summary_of(json.loads((output / "summary.json").read_text()))


def _exact_match(
    run: TrainRun, prepared: Prepared | Streamed, final: Path | None, tell: Callable[[Any], None], workspace: Workspace
) -> ExactMatch | None:
    """Exact match on held-out rows with train.exact_match_rows, else None. final: the trained model; None: the base model."""
    if not run.train.exact_match_rows:
        return None
    which = "before" if final is None else "after"
    with notify_if_slow(tell, f"answering {run.train.exact_match_rows} held-out rows {which} training") as answering:
        return _answered(run, prepared, final, workspace, answering.of)


def _answered(
    run: TrainRun,
    prepared: Prepared | Streamed,
    final: Path | None,
    workspace: Workspace,
    on_answered: Callable[[int, int], object],
) -> ExactMatch:
    from raytune_llm.evaluate.held_out import answer_held_out_rows

    train_store, eval_store = prepared.places
    store, apart = eval_store or train_store, eval_store is not None
    if on_cluster(run.resources):
        from raytune_llm.runs.remote_task import call_counted

        return call_counted(run.resources, partial(answer_held_out_rows, run, store, final, apart, None), on_answered)
    return answer_held_out_rows(run, store, final, apart, workspace, on_answered)
