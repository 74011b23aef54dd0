"""Builds token stores from raw rows, with Ray Data or in this process. [ray]

Both map the function `prepare_chunk`, which writes a shard and returns its statistics, over the chunks of the source, so that
both build identical shards. No row passes through the driver.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast

from raytune_llm import session
from raytune_llm.config.data import DataConfig
from raytune_llm.config.model import ModelConfig
from raytune_llm.config.resources import ResourcesConfig, uses_ray
from raytune_llm.data.dropped import Dropped
from raytune_llm.data.formats import Reading, columns_of, converter
from raytune_llm.data.intact import check_intact
from raytune_llm.data.kinds import KINDS
from raytune_llm.data.kinds.kind import Targets
from raytune_llm.data.readers import sources
from raytune_llm.data.readers.chunks import Chunk, Source
from raytune_llm.data.readers.declarations import Declared, declared, declared_for_evaluation, source_of
from raytune_llm.data.shards import Recipe, Timed, fetched, prepare_chunk
from raytune_llm.data.shared_stores import SharedStore, being_made, local_cache, local_folder, open_store, place_in
from raytune_llm.data.store import (
    FAILED,
    FORMAT_VERSION,
    MANIFEST,
    Shard,
    Store,
    complete,
    finished_shard,
    join,
    key_of,
    partial,
    shard_name,
    write_outline,
)
from raytune_llm.data.templates.chat_template import ChatTemplate
from raytune_llm.data.templates.named import NamedTemplate
from raytune_llm.data.templates.named_chat import NamedChat
from raytune_llm.data.templates.rendered import PlainText, Renderer
from raytune_llm.data.tokens.tokenize import BlockTokenizer
from raytune_llm.data.tokens.tokenizer import fingerprint, run_tokenizer
from raytune_llm.errors import DataError, RunLost, UserError
from raytune_llm.object_store import check_writable, is_address

T = TypeVar("T")
log = logging.getLogger(__name__)
TRANSFORMS_VERSION = 8
"""Increase it when the same row would give other tokens, so that old stores are not reused."""
TASK_ROWS, TASKS_PER_WORKER = 2_000, 4
"""Small chunks are grouped into Ray tasks of TASK_ROWS rows, since scheduling a task takes as long as a hundred rows, unless a
worker would then have fewer than TASKS_PER_WORKER tasks, which would leave some workers idle at the end."""
NO_PROGRESS_S = 3600.0
"""A task of Ray takes minutes. One that a frozen process has never ends, and Ray would wait for it without limit."""
BUSY_SAID_AFTER_S, BUSY_SAID_AGAIN_S = 3.0, 30.0
OnProgress = Callable[[int, int], None]
"""Called with (rows done, rows in total), dropped ones included."""


@dataclass(frozen=True)
class Prepared:
    """The stores of a run, and the speed at which they were built."""

    store: Store
    eval_store: Store | None
    rows_per_s: float
    """Rows per second, without the time to start Ray and to list the source. 0: all stores existed."""
    seconds: float
    reused: bool
    """All stores existed already."""

    @property
    def folder(self) -> Path:
        return self.store.folder

    @property
    def places(self) -> tuple[str, str | None]:
        """Of the stores for training and, if separate, for evaluation."""
        return self.store.place, None if self.eval_store is None else self.eval_store.place

    @property
    def manifests(self) -> dict[str, str]:
        """ "train" or "evaluation" -> hash of the store's manifest."""
        evaluation = {} if self.eval_store is None else {"evaluation": self.eval_store.manifest_hash}
        return {"train": self.store.manifest_hash, **evaluation}

    def making(self, *, max_tasks: int | None) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Streamed:
    """The stores of a run with data.streaming, which trains while its store is built."""

    folder: Path
    """The folder that the complete store will have."""
    eval_store: Store | None
    make: Callable[[OnProgress, int | None], None]
    """Builds the store: make(on_progress, max_tasks)."""

    @property
    def places(self) -> tuple[str, str | None]:
        """Like Prepared.places."""
        return str(self.folder), None if self.eval_store is None else self.eval_store.place

    @property
    def manifests(self) -> dict[str, str]:
        """Like Prepared.manifests, but with the key of the training store, whose manifest is written last."""
        evaluation = {} if self.eval_store is None else {"evaluation": self.eval_store.manifest_hash}
        return {"train": self.folder.name, **evaluation}

    @contextmanager
    def making(self, *, max_tasks: int | None) -> Iterator[None]:
        """Builds the store in a thread while the context lasts; at its end, the current chunks are finished.

        A later run can reuse the shards. An error of the thread is raised at the end of the context, in place of the error that
        it caused there.
        """
        (partial(self.folder) / FAILED).unlink(missing_ok=True)
        stopped = threading.Event()
        failures: list[Exception] = []

        def check_stopped(done: int, total: int) -> None:
            if stopped.is_set():
                raise InterruptedError("training has ended")

        def run() -> None:
            try:
                self.make(check_stopped, max_tasks)
            except InterruptedError:
                pass
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=run, name="prepare", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            if failures:
                raise failures[0] from None


def prepare(
    model: ModelConfig,
    data: DataConfig,
    resources: ResourcesConfig,
    *,
    kind: str = "conversations",
    on_progress: OnProgress | None = None,
    check_cluster: Callable[[], None] = lambda: None,
) -> Prepared:
    """Open or build the token stores of the training data and of the evaluation data.

    kind: the kind of row that the stage trains on, a name in KINDS. Several data sets have one store each, and a joined one.
    check_cluster: called when this process has joined Ray, before rows are prepared there.
    Raises ConfigError for settings, DataError for the data.
    """
    if is_address(data.cache):
        check_writable(data.cache, "data.cache")
    started = time.perf_counter()
    made: list[Timed] = []
    preprocessor = preprocessor_of(model, data, kind)
    ranked = KINDS[kind].ranked
    job = Job(data, resources, on_progress, check_cluster=check_cluster)
    return Prepared(
        store=_prepare_all(declared(data, ranked=ranked), preprocessor, job, made),
        eval_store=_prepare_all(held_out, preprocessor, job, made)
        if (held_out := declared_for_evaluation(data, ranked=ranked))
        else None,
        rows_per_s=_rows_per_s(made),
        seconds=time.perf_counter() - started,
        reused=not made,
    )


def stream(model: ModelConfig, data: DataConfig, resources: ResourcesConfig, *, kind: str = "conversations") -> Streamed:
    """Like `prepare`, but the training store is built while the run trains (see Streamed.making)."""
    preprocessor = preprocessor_of(model, data, kind)
    ranked = KINDS[kind].ranked
    held_out = declared_for_evaluation(data, ranked=ranked)
    (one,) = declared(data, ranked=ranked)

    def make(on_progress: OnProgress, max_tasks: int | None) -> None:
        _prepare_one(one, preprocessor, Job(data, resources, on_progress, max_tasks), [])

    return Streamed(
        folder=_folder(one, preprocessor, data),
        eval_store=_prepare_all(held_out, preprocessor, Job(data, resources), []) if held_out else None,
        make=make,
    )


def _prepare_all(sets: list[Declared], preprocessor: Preprocessor, job: Job, made: list[Timed]) -> Store:
    members = [(one.name, _prepare_one(one, preprocessor, job, made)) for one in sets]
    if len(members) == 1:
        return members[0][1]
    cache = job.data.cache
    joined = join(local_cache(cache), members)
    if not is_address(cache):
        return joined
    place = place_in(cache, joined.folder.name)
    SharedStore(place).publish()
    return open_store(place)


def find_stores(model: ModelConfig, data: DataConfig, *, kind: str = "conversations") -> tuple[Path | None, Path | None]:
    """Folders of the training and evaluation stores on this machine, if they are complete; None for each that `prepare` would
    build or download."""
    preprocessor = preprocessor_of(model, data, kind)

    def found(sets: list[Declared]) -> Path | None:
        folders = [_folder(one, preprocessor, data) for one in sets]
        if len(folders) > 1 and all((folder / MANIFEST).exists() for folder in folders):
            joined = {"joined": [[one.name, folder.name] for one, folder in zip(sets, folders, strict=True)]}
            folders = [local_cache(data.cache) / key_of(joined)]
        return folders[0] if len(folders) == 1 and (folders[0] / MANIFEST).exists() else None

    ranked = KINDS[kind].ranked
    return found(declared(data, ranked=ranked)), found(declared_for_evaluation(data, ranked=ranked))


@dataclass(frozen=True)
class Job:
    """How stores are built."""

    data: DataConfig
    resources: ResourcesConfig
    on_progress: OnProgress | None = None
    max_tasks: int | None = None
    """Maximum number of concurrent tasks. None: one per CPU."""
    check_cluster: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Preprocessor:
    """The tokenizer, template and settings that all data sets of a run share."""

    kind: str
    tokenizer: PreTrainedTokenizerFast
    template: NamedTemplate | None
    renderer: Renderer | PlainText
    targets: Targets


def preprocessor_of(model: ModelConfig, data: DataConfig, kind: str) -> Preprocessor:
    """The run's Preprocessor. kind: the kind of row, a name in KINDS. Raises ConfigError without a usable template."""
    of_kind = KINDS[kind]
    tokenizer, template = run_tokenizer(model, data, needs_template=of_kind.renders_chat)
    renderer = renderer_of(tokenizer, template, data) if of_kind.renders_chat else PlainText(tokenizer)
    end = renderer.end_of_row
    targets = Targets(
        max_length=data.max_length,
        overlong=data.overlong,
        mask_history=data.mask_history,
        train_on_prompt=data.train_on_prompt,
        preserve_thinking=data.preserve_thinking,
        end_of_row=None if end is None else tokenizer.convert_tokens_to_ids(end),  # type: ignore[arg-type]
    )
    targets = of_kind.targets(targets, tokenizer, packing=data.packing)
    return Preprocessor(kind=kind, tokenizer=tokenizer, template=template, renderer=renderer, targets=targets)


def renderer_of(tokenizer: PreTrainedTokenizerFast, template: NamedTemplate | None, data: DataConfig) -> Renderer:
    """The renderer for a tokenizer and template from run_tokenizer."""
    if template is None:
        # For named templates true is the default. A tokenizer's template has its own default, which None selects.
        thinking = False if data.enable_thinking is False else None
        return ChatTemplate(tokenizer, default_system=data.default_system, thinking=thinking)
    return NamedChat(template, tokenizer, enable_thinking=data.enable_thinking, preserve_thinking=data.preserve_thinking)


def _prepare_one(one: Declared, preprocessor: Preprocessor, job: Job, made: list[Timed]) -> Store:
    data = job.data
    source = source_of(one)
    made_from = _made_from(one, preprocessor, data, sources.fingerprint(source))
    place = place_in(data.cache, key_of(made_from))
    target, shared = local_folder(place), SharedStore(place) if is_address(place) else None
    with being_made(place) as folder:
        if folder is not None and not (shared is not None and shared.fetch_into(folder)):
            recipe = recipe_of(one, source, preprocessor, data)
            chunks = chunks_of(one, source, data)
            write_outline(folder, len(chunks), preprocessor.kind, preprocessor.targets.end_of_row)
            if shared is not None:
                shared.fetch_unfinished(folder)
            shards = _make_shards(chunks, recipe, place, job, made)
            if shared is not None:
                shared.fetch_others(folder, shards)
            _check(one.path, shards, data.max_bad_fraction)
            complete(folder, shards, made_from, target, kind=preprocessor.kind, end_of_row=preprocessor.targets.end_of_row)
    if shared is not None:
        shared.publish()
    check_intact(target)
    store = open_store(place)
    _check_dropped(one.path, store.num_rows, store.dropped, data.max_bad_fraction)
    return store


def recipe_of(one: Declared, source: Source, preprocessor: Preprocessor, data: DataConfig) -> Recipe:
    """All that turns a data set's rows into tokens."""
    template = preprocessor.template
    markers = {} if template is None else {"thought": template.thought, "call_words": template.tool_call_words}
    reading = Reading(media_dir=one.media_dir, drop_thoughts=data.reasoning == "drop", untyped=source.kind == "csv", **markers)
    return Recipe(
        kind=preprocessor.kind,
        columns=columns_of(one.format),
        convert=converter(one.format, reading),
        renderer=preprocessor.renderer,
        tokenize=BlockTokenizer(preprocessor.tokenizer),
        targets=preprocessor.targets,
    )


def chunks_of(one: Declared, source: Source, data: DataConfig) -> list[Chunk]:
    part = None if source.is_hub else one.split
    return sources.plan(source, data.max_samples, part=part, num_samples=one.num_samples, split_setting=one.split_setting)


def _folder(one: Declared, preprocessor: Preprocessor, data: DataConfig) -> Path:
    return local_cache(data.cache) / key_of(_made_from(one, preprocessor, data, sources.fingerprint(source_of(one))))


def _made_from(one: Declared, preprocessor: Preprocessor, data: DataConfig, source_hash: str) -> dict[str, Any]:
    """Everything that determines the tokens, and nothing else, such as the location of files."""
    return {
        "transforms_version": TRANSFORMS_VERSION,
        "format_version": FORMAT_VERSION,
        "kind": preprocessor.kind,
        "source": source_hash,
        "split": one.split,
        "num_samples": one.num_samples,
        "max_samples": data.max_samples,
        "format": asdict(one.format),
        "template": preprocessor.tokenizer.chat_template,
        "default_system": data.default_system,
        "enable_thinking": data.enable_thinking,
        "reasoning": data.reasoning,
        "tokenizer": fingerprint(preprocessor.tokenizer),
        **asdict(preprocessor.targets),
    }


def _make_shards(
    chunks: list[Chunk],
    recipe: Recipe,
    place: str,
    job: Job,
    made: list[Timed],
) -> list[Shard]:
    """Build one shard per chunk, except for those that an earlier run finished. Appends the built ones to `made`."""
    folder = partial(local_folder(place))
    num_rows = sum(chunk.num_picked for chunk in chunks)
    shards = {
        number: shard
        for number, chunk in enumerate(chunks)
        if (shard := finished_shard(folder / shard_name(number)))
        and all(rows.is_of(chunk.file) for rows in (shard.stats.dropped, shard.stats.shortened))
    }
    num_done = sum(chunks[number].num_picked for number in shards)
    missing = [(number, chunk) for number, chunk in enumerate(chunks) if number not in shards]
    mapped = _map_with_ray if uses_ray(job.resources) else _map_inline
    for number, timed in mapped(missing, recipe, place, job):
        made.append(timed)
        shards[number] = timed.shard
        num_done += chunks[number].num_picked
        if job.on_progress is not None:
            job.on_progress(num_done, num_rows)
    return [shards[number] for number in range(len(chunks))]


def _map_inline(chunks: Iterable[tuple[int, Chunk]], recipe: Recipe, place: str, job: Job) -> Iterator[tuple[int, Timed]]:
    for number, chunk in chunks:
        yield number, _make_shard(number, chunk, recipe, place)


def _make_shard(number: int, chunk: Chunk, recipe: Recipe, place: str) -> Timed:
    """Build a shard in this machine's folder of the store, and upload it if the store is in an object store."""
    folder = partial(local_folder(place))
    if not is_address(place):
        return prepare_chunk(chunk, recipe, folder / shard_name(number))
    folder.mkdir(parents=True, exist_ok=True)  # each machine has its own
    made = prepare_chunk(chunk, recipe, folder / shard_name(number))
    SharedStore(place).keep(folder, made.shard)
    return made


def _map_with_ray(chunks: list[tuple[int, Chunk]], recipe: Recipe, place: str, job: Job) -> Iterator[tuple[int, Timed]]:
    """Map chunks with Ray Data. Each task writes its own shards, and only names and statistics are transferred."""
    assert uses_ray(job.resources)
    if not chunks:
        return
    session.connect(job.resources)
    job.check_cluster()
    import ray

    # Workers take seconds to import their modules, and do so while this process imports Ray Data.
    num_workers = min(len(chunks), job.max_tasks or int(ray.cluster_resources().get("CPU", 1)))
    busy = ray.available_resources().get("CPU", 0) < 1
    load = ray.remote(num_cpus=1)(_load)
    loading = [load.remote() for _ in range(num_workers)]
    import ray.data
    from ray.data.exceptions import ExecutionTimeoutError

    if busy:
        _wait_for_a_cpu(loading)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress and errors are reported by this program
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.op_resource_reservation_enabled = False  # results are small, and a reservation would leave CPUs idle
    recipe_ref = ray.put(recipe)

    def prepare_block(block: dict[str, Any]) -> dict[str, list[bytes]]:
        """Errors in the data are returned as values, since Ray would wrap an exception in its own."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks use all cores already
        done = []
        for number, chunk in map(pickle.loads, block["chunk"]):
            try:
                made = _make_shard(number, chunk, fetched(ray.get, recipe_ref), place)
            except UserError as error:
                made = error
            done.append(pickle.dumps((number, made)))
        return {"made": done}

    num_rows = sum(chunk.num_picked for _, chunk in chunks)
    num_tasks = min(len(chunks), max(num_rows // TASK_ROWS, TASKS_PER_WORKER * num_workers))
    items = [{"chunk": pickle.dumps(numbered)} for numbered in chunks]
    blocks = ray.data.from_items(items, override_num_blocks=num_tasks)
    blocks.context.execution_no_progress_timeout_s = NO_PROGRESS_S
    task: Any = prepare_block
    rows = iter(blocks.map_batches(task, batch_size=None, num_cpus=1, concurrency=job.max_tasks).iter_rows())
    while (row := _next(rows, ExecutionTimeoutError)) is not None:
        number, made = pickle.loads(row["made"])
        if isinstance(made, UserError):
            raise made
        yield number, made


def _next(rows: Iterator[T], nothing_came: type[Exception]) -> T | None:
    """The next item, or None at the end. Raises RunLost if nothing came for NO_PROGRESS_S."""
    try:
        return next(rows, None)
    except nothing_came:
        what = f"no task that prepares rows has ended for {NO_PROGRESS_S:g} s: a process, a node or the storage stands still"
        raise RunLost(what, "See `ray status` and `ray list tasks`; the same command resumes from the finished shards.") from None


def _wait_for_a_cpu(loading: list[Any]) -> None:
    """Wait without limit until one of these tasks, each of one CPU, has run, and say so."""
    import ray

    wait_s = BUSY_SAID_AFTER_S
    while not ray.wait(loading, timeout=wait_s)[0]:
        free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
        log.warning("waiting for 1 CPU to prepare rows; the cluster has %g of %g CPUs free", free, total)
        wait_s = BUSY_SAID_AGAIN_S


def _load() -> None:
    """Import the modules that a task needs."""
    import ray.data  # noqa: F401

    import raytune_llm.data.shards  # noqa: F401


def _check(path: str, shards: list[Shard], max_bad_fraction: float) -> None:
    dropped = Dropped()
    for shard in shards:
        dropped.merge(shard.stats.dropped)
    _check_dropped(path, sum(shard.stats.rows for shard in shards), dropped, max_bad_fraction)


def _check_dropped(path: str, num_rows: int, dropped: Dropped, max_bad_fraction: float) -> None:
    """Raises DataError if no row is left, or if more than max_bad_fraction of the rows are bad."""
    if num_rows == 0:
        raise DataError(path, f"no row can be used. Dropped: {dropped}", "Correct the data, or the settings that are named.")
    bad_fraction = dropped.num_bad / (num_rows + dropped.total)
    if bad_fraction > max_bad_fraction:
        raise DataError(
            path,
            f"{dropped.num_bad} of {num_rows + dropped.total} rows can't be used, more than data.max_bad_fraction = "
            f"{max_bad_fraction:g} of them. Dropped: {dropped}",
            f"Correct the data, or allow it with data.max_bad_fraction={-(-bad_fraction * 100 // 1) / 100:g}.",
        )


def _rows_per_s(made: list[Timed]) -> float:
    """Rows per second, from the start of the chunk that was finished first to the end of the last one."""
    if not made:
        return 0.0
    first = min(made, key=lambda timed: timed.ended)
    seconds = max(timed.ended for timed in made) - first.started
    num_rows = sum(timed.shard.stats.rows + timed.shard.stats.dropped.total for timed in made)
    return num_rows / max(seconds, 1e-9)
