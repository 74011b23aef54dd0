"""`predict`: generates each model's answer to each row of a data set, in order, and computes metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from raytune_llm.atomic_file import write_atomically
from raytune_llm.config.plain import as_plain
from raytune_llm.config.predict import PredictConfig
from raytune_llm.config.run import PredictRun
from raytune_llm.engines.questions import BLOCK_QUESTIONS, Answered, Answering, Question
from raytune_llm.engines.requests import Sampling
from raytune_llm.errors import ConfigError
from raytune_llm.losses.perplexity import perplexity
from raytune_llm.predict.answering import EngineSettings, answering
from raytune_llm.predict.judge import Judge, judged
from raytune_llm.predict.metrics import Metric, metrics_of
from raytune_llm.predict.models import check_run_writes, check_writes, served_with
from raytune_llm.predict.predictions import FILE, FILES, columns_of, line, lines, open_predictions
from raytune_llm.predict.rows import PromptRow, PromptRows
from raytune_llm.report.metrics import non_finite_as_strings
from raytune_llm.runs.contents import adapter_contents, model_contents
from raytune_llm.runs.output import full_disk_explained
from raytune_llm.runs.owner import check_writable, owned
from raytune_llm.runs.trained import read_trained

OnProgress = Callable[[int, int], None]
"""(number of written lines, number of all lines)."""
KEPT = "what is answered is kept, and the same command answers the rest"


@dataclass(frozen=True)
class Predicted:
    folder: Path
    rows: int
    models: tuple[str, ...]
    found: int
    """The number of lines that an earlier command had written."""
    metrics: Mapping[str, Mapping[str, Any]]
    """Model -> its metrics."""
    generated_tokens: int
    seconds: float
    """The time in seconds for this command's answers, without loading."""


def predict(run: PredictRun, on_progress: OnProgress = lambda done, total: None) -> Predicted:
    assert run.output_dir is not None
    folder = Path(run.output_dir)
    check_writable(folder, *FILES)
    metrics = metrics_of(run.predict.metrics) if run.predict.generate else []
    judge = None if run.predict.judge is None else Judge(run)
    run, adapters = _with_trained(run)
    models = _models(run.predict, adapters)
    for name, place in adapters.items():
        check_writes(place, f"predict.adapters.{name}")
    rows = PromptRows(run.model, run.data)
    num_rows = rows.check(None if run.predict.max_length is None else run.predict.max_length - 1)
    served = served_with(
        adapters,
        max_rank=run.predict.max_rank,
        precision=run.predict.precision,
        max_length=run.predict.max_length,
        template=run.data.template,
    )
    settings = EngineSettings(run.model, run.quantization, run.engine, served)
    settings.check(base="predict.base" if None in models and adapters else None)
    with owned(folder), full_disk_explained(folder, then=KEPT):
        decides = _decides(run, models, adapters, rows.fingerprints)
        found = open_predictions(folder, decides, resume=run.predict.resume == "auto", models=len(models))
        total, tokens, began = num_rows * len(models), 0, time.perf_counter()
        if found < total:
            with answering(settings, run.resources) as answer:
                began = time.perf_counter()
                tokens = _write(folder, found, total, rows, models, answer, run.predict, on_progress)
        seconds = time.perf_counter() - began
        measured = {name or "base": _measured(folder, name, metrics) for name in models}
        judged(judge, folder, models, measured)
        numbers: Any = non_finite_as_strings(next(iter(measured.values())) if len(measured) == 1 else measured)
        write_atomically(folder / "metrics.json", json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        if run.predict.llamafactory_files:
            _write_as_llamafactory(folder, rows, numbers)
    return Predicted(folder, num_rows, tuple(name or "base" for name in models), found, measured, tokens, seconds)


def _with_trained(run: PredictRun) -> tuple[PredictRun, dict[str, str]]:
    """The run with the model and the chat template of predict.run, and adapter name -> folder, predict.run's first."""
    if run.predict.run is None:
        return run, dict(run.predict.adapters)
    trained = read_trained(run.predict.run, "predict.run")
    check_run_writes(trained, "predict.run")
    adapters = dict(run.predict.adapters)
    if trained.adapter is not None:
        if trained.name in adapters:
            rule = f"must not hold {trained.name}, the name of predict.run"
            raise ConfigError("predict.adapters", rule, got=sorted(adapters), fix="Choose another name.")
        adapters = {trained.name: str(trained.adapter), **adapters}
    predict = replace(run.predict, run=None)  # the model is given from here on
    return replace(run, model=trained.model, data=trained.rendered(run.data), predict=predict), adapters


def _models(predict: PredictConfig, adapters: Mapping[str, str]) -> list[str | None]:
    """None for the base model if it is to answer, then the adapters' names."""
    if "base" in adapters:
        raise ConfigError("predict.adapters", "must hold no adapter called base: that is the model without one", got=["base"])
    with_base = not adapters if predict.base == "auto" else predict.base
    models = [*([None] if with_base else []), *adapters]
    if not models:
        raise ConfigError("predict.base", "must be true if there is no adapter", got=False)
    if predict.llamafactory_files and len(models) > 1:
        rule = "must be false where several models answer: its lines don't say whose they are"
        raise ConfigError("predict.llamafactory_files", rule, got=[name or "base" for name in models])
    return models


def _decides(
    run: PredictRun, models: Sequence[str | None], adapters: Mapping[str, str], fingerprints: Sequence[str]
) -> dict[str, Any]:
    """The settings and file contents that the answers depend on. Lines that were written under others can't be resumed."""
    plain = as_plain(run)
    data = {key: value for key, value in plain["data"].items() if key not in ("path", "cache", "max_bad_fraction")}
    beside = ("run", "adapters", "metrics", "judge", "resume", "llamafactory_files", "max_rank")
    predict = {f"predict.{key}": value for key, value in plain["predict"].items() if key not in beside}
    return {
        **predict,
        "model": {key: value for key, value in plain["model"].items() if key != "attention"},
        "quantization": plain["quantization"],
        "engine": plain["engine"]["name"],
        "data": data,
        "contents of the data": list(fingerprints),
        "order of the models": [name or "base" for name in models],
        "contents of the model": model_contents(run.model),
        "adapters": {name: adapter_contents(folder) for name, folder in adapters.items()},
    }


@dataclass(frozen=True, slots=True)
class _Pair:
    row: PromptRow
    model: str | None
    """Name of an adapter. None: the base model."""


def _write(
    folder: Path,
    found: int,
    total: int,
    rows: PromptRows,
    models: Sequence[str | None],
    answer: Answering,
    predict: PredictConfig,
    on_progress: OnProgress,
) -> int:
    """Append the missing lines. Returns the number of generated tokens."""
    pairs = islice((_Pair(row, model) for row in rows for model in models), found, None)
    ended = {tuple(rows.end_ids), *((end,) for end in rows.end_ids), ()}
    pending: list[list[_Pair]] = []

    def blocks() -> Iterator[list[Question]]:
        while block := list(islice(pairs, BLOCK_QUESTIONS)):
            pending.append(block)
            yield [_question(one, predict, has_no_answer=one.row.answer_ids in ended) for one in block]

    tokens, done = 0, found
    on_progress(done, total)
    # A column may hold a lone surrogate, which has no bytes in UTF-8. A backslash and its number are JSON's own way to write it.
    with (folder / FILE).open("a", encoding="utf-8", errors="backslashreplace") as file:
        for answers in answer(blocks()):
            for one, answered in zip(pending.pop(0), answers, strict=True):
                given = "" if one.row.answer_ids in ended else _text(rows.tokenizer, one.row.answer_ids)
                file.write(_line(one, answered, rows.tokenizer, given))
                tokens += len(answered.ids)
            file.flush()
            done += len(answers)
            on_progress(done, total)
    return tokens


def _question(pair: _Pair, predict: PredictConfig, *, has_no_answer: bool) -> Question:
    row = pair.row
    sampling = None
    if predict.generate and row.bad is None:
        sampling = Sampling(
            max_new_tokens=predict.max_new_tokens,
            temperature=predict.temperature,
            top_p=predict.top_p,
            top_k=predict.top_k,
            repetition_penalty=predict.repetition_penalty,
            stop=tuple(predict.stop),
            seed=(predict.seed * 1_000_003 + row.number) % 2**63,
        )
    given = () if not predict.score or has_no_answer or row.bad is not None else row.answer_ids
    return Question(row.prompt_ids, given, pair.model, sampling)


def _line(pair: _Pair, answered: Answered, tokenizer: Any, given: str) -> str:
    row = pair.row
    own: dict[str, Any] = {
        "row": row.number,
        "model": pair.model or "base",
        "prompt": _text(tokenizer, row.prompt_ids),
        "predict": answered.text,
        "label": given or None,
    }
    if answered.finish is not None:
        own["finish"] = answered.finish
    if answered.logprobs:
        own |= {"logprob": math.fsum(answered.logprobs), "label_tokens": len(answered.logprobs)}
    if (error := row.bad or answered.refused) is not None:
        own["error"] = error
    return line(own, row.columns)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def _measured(folder: Path, model: str | None, metrics: Iterable[Metric]) -> dict[str, Any]:
    answers: list[str] = []
    references: list[str] = []
    columns: list[dict[str, Any]] = []
    rows = failed = label_tokens = 0
    logprobs: list[float] = []
    for one in lines(folder):
        if one["model"] != (model or "base"):
            continue
        rows += 1
        failed += "error" in one
        if "logprob" in one:
            logprobs.append(float(one["logprob"]))
            label_tokens += one["label_tokens"]
        if one["predict"] is not None and one["label"] is not None:
            answers.append(one["predict"])
            references.append(one["label"])
            columns.append(columns_of(one))
    numbers: dict[str, Any] = {"rows": rows, "failed": failed, "compared": len(answers)}
    for metric in metrics if answers else ():
        found = metric(answers, references, columns)
        if twice := sorted(numbers.keys() & found.keys()):
            fix = "Give it another name, or leave one out, and type the same command again: the answers are kept."
            raise ConfigError("predict.metrics", "must give each number a name of its own", got=twice, fix=fix)
        numbers |= found
    if logprobs:
        numbers |= {"logprob": fmean(logprobs), "perplexity": perplexity(-math.fsum(logprobs) / label_tokens)}
    return numbers


def _write_as_llamafactory(folder: Path, rows: PromptRows, numbers: Mapping[str, Any]) -> None:
    """Write the files of LLaMA-Factory's predict, for one model. Their prompts include special tokens."""
    theirs = []
    for row, one in zip(rows, lines(folder), strict=True):
        prompt = rows.tokenizer.decode(list(row.prompt_ids))
        values = {"prompt": prompt, "predict": one["predict"] or "", "label": one["label"] or ""}
        theirs.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_atomically(folder / "generated_predictions.jsonl", "".join(theirs))
    write_atomically(folder / "predict_results.json", json.dumps(numbers, indent=4, ensure_ascii=False))
