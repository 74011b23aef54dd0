"""predictions.jsonl: one line per row and model, in their order, written while answers are generated.

A killed run leaves complete lines, and at most one incomplete line at the end, which is removed. The command resumes after them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_llm.errors import ConfigError, DataError
from raytune_llm.report.metrics import non_finite_as_strings

FILE = "predictions.jsonl"
SETTINGS = "predict.json"
"""File with the settings and file contents that the folder's predictions depend on."""
REWARDS = "rewards.jsonl"
"""One line per line of predictions.jsonl: row, model, and a judge's scores (null: there is no such answer, or it is too long)."""
FILES = (FILE, SETTINGS, "metrics.json", REWARDS, "generated_predictions.jsonl", "predict_results.json")
"""The files of the output folder, the last two in LLaMA-Factory's layout."""
OWN = ("row", "model", "prompt", "predict", "label", "finish", "logprob", "label_tokens", "error")
"""Keys of a line. A column of the data with one of these names is written as input_<name>, and one that is called so as
input_input_<name>."""
ALWAYS = {"row", "model", "prompt", "predict", "label"}
"""The keys that every line has."""
INPUT = "input_"


def line(own: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    named = {f"{INPUT}{name}" if _is_like_own(name) else name: value for name, value in columns.items()}
    values = non_finite_as_strings({**own, **named})
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def lines(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / FILE).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def columns_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the data, by their own names."""
    return {name.removeprefix(INPUT) if _is_like_own(name) else name: value for name, value in line.items() if name not in OWN}


def _is_like_own(name: str) -> bool:
    while name.startswith(INPUT):
        name = name.removeprefix(INPUT)
    return name in OWN


def open_predictions(folder: Path, settings: Mapping[str, Any], *, resume: bool, models: int) -> int:
    """Prepare the folder. Returns the number of lines to keep. Raises ConfigError if it has predictions of other settings.

    models: lines of a row.
    """
    file = folder / FILE
    if not resume:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
    if file.exists():
        _check_same(folder, settings)
        return _whole_lines(file, models)
    beside = folder / f".{SETTINGS}-new"
    beside.write_text(json.dumps(settings, indent=1, sort_keys=True))
    beside.rename(folder / SETTINGS)
    return 0


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    fix = "Choose another output_dir, or set predict.resume=never to start again there."
    try:
        then = dict(json.loads((folder / SETTINGS).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise ConfigError(
            "output_dir", f"holds a {FILE} of which it isn't known how it was made", got=str(folder), fix=fix
        ) from None
    now = json.loads(json.dumps(settings))
    changed = [
        f"{key} from {then.get(key)} to {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed:
        what = "; ".join(changed)[:600]
        raise ConfigError("output_dir", f"holds other predictions; what changed: {what}", got=str(folder), fix=fix)


def _row_of(text: bytes) -> Any:
    """The number of a line's row; None for a line that is not whole."""
    try:
        found = json.loads(text)
        return found["row"] if text.endswith(b"\n") and found.keys() >= ALWAYS else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _whole_lines(file: Path, models: int) -> int:
    """The number of complete lines. An incomplete one, left by a crash, is cut off."""
    found = end = 0
    with file.open("rb") as stream:
        for one in stream:
            row = _row_of(one)
            if row is None:
                break
            if row != found // models + 1:
                fix = "Choose another output_dir, or set predict.resume=never."
                raise DataError(f"{file}, line {found + 1}", f"must be of row {found // models + 1}, not {row}", fix)
            found, end = found + 1, end + len(one)
    with file.open("r+b") as stream:
        stream.truncate(end)
    return found
