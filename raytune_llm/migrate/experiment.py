"""`import`: a training file of LLaMA-Factory becomes an experiment of ours."""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from raytune_llm.config.load import load_config
from raytune_llm.config.options import groups
from raytune_llm.config.paths import expanded
from raytune_llm.config.plain import read_yaml, to_yaml_text
from raytune_llm.config.run import ImportRun, TrainRun
from raytune_llm.errors import ConfigError
from raytune_llm.migrate.argument_rules import Settings
from raytune_llm.migrate.rules.values import Find
from raytune_llm.migrate.translation import ArgumentOutcome, Translation, translate

WIDTH = 120


def translate_file(run: ImportRun) -> Translation:
    """Reads the file; writes nothing. Raises ConfigError where it is no YAML of arguments."""
    file = expanded(run.file or "")
    given = read_yaml(file, setting="file")
    return translate(given, world_size=run.world_size, dataset_info=run.dataset_info, find=_finder(file))


def write(run: ImportRun, translation: Translation) -> Path:
    """The experiment's file, which was composed and checked first.

    Raises ConfigError where an argument is refused, where the result breaks a rule of ours, and where another file is there.
    """
    if translation.refused:
        raise ConfigError(str(run.file), f"can't be imported, and nothing was written: {_listed(translation.refused).rstrip()}")
    name = experiment_name(run)
    text = as_text(run, translation)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder, "experiment", f"{name}.yaml")
        trial.parent.mkdir()
        trial.write_text(text)
        load_config("train", [f"+experiment={name}"], config_dir=folder)
    target = expanded(run.config_dir) / "experiment" / f"{name}.yaml"
    if target.exists() and not _holds(target, text) and not run.overwrite:
        fix = "Choose another name, or set overwrite=true."
        raise ConfigError("name", f"must be new: {target} is another experiment", got=name, fix=fix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.partial")
        beside.write_text(text)
        beside.replace(target)
    except OSError as error:
        raise ConfigError("config_dir", f"must be a folder that can be written ({error.strerror})", got=run.config_dir) from None
    return target


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def declaration_elsewhere(translation: Translation) -> str | None:
    """The dataset_info.json that the run wants, where it is not here: nothing could be checked about its data sets."""
    path = translation.settings.get("data.dataset_info")
    return None if path is None or expanded(path).is_file() else path


def experiment_name(run: ImportRun) -> str:
    return run.name or re.sub(r"[^\w.-]", "_", Path(run.file or "").stem)


def as_text(run: ImportRun, translation: Translation) -> str:
    """YAML of every setting, LLaMA-Factory's defaults among them, with what was left out as comments."""
    place = {field.name: number for number, field in enumerate(fields(TrainRun))}
    settings = {"name": experiment_name(run), **translation.settings}
    settings = {path: settings[path] for path in sorted(settings, key=lambda path: place[path.partition(".")[0]])}
    chosen = [group for group in settings if group in groups()]
    values = {"defaults": [{f"override /{group}": settings[group]} for group in chosen], **_nested(settings, chosen)}
    return "\n".join(["# @package _global_", *_comments(run, translation), to_yaml_text(values)])


def _comments(run: ImportRun, translation: Translation) -> list[str]:
    lines = [f"{Path(run.file or '').name} of LLaMA-Factory, by `raytune_llm import`."]
    lines += textwrap.wrap(_batches(translation.settings), WIDTH)
    if not_found := declaration_elsewhere(translation):
        lines += [f"{not_found} was not here when this was made: nothing is known of the data sets."]
    if left_out := translation.of("no effect"):
        lines += ["", "Without effect here:"]
        lines += [f"  {outcome.argument}: {outcome.text}" for outcome in left_out]
    return [f"# {line}".rstrip() for line in lines]


def _batches(settings: Settings) -> str:
    micro, total = settings["train.micro_batch_size"], settings["train.global_batch_size"]
    unit = "packs of data.max_length tokens" if settings["data.packing"] else "rows"
    faster = "" if settings["data.packing"] else " data.packing=true is faster; a step then sees as many packs."
    return (
        f"A step sees {total} {unit}, {micro} a GPU at once, on any number of GPUs that {total // micro} can be divided by."
        f"{faster} What the file does not say has LLaMA-Factory's default."
    )


def _nested(settings: Settings, chosen: Sequence[str]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}, without the chosen groups' options."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        if path in chosen:
            continue
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _finder(file: Path) -> Find:
    """Searches the working folder, then the file's folder, then every folder above it: examples/x.yaml names data/."""

    def find(path: str) -> str | None:
        wanted = expanded(path)
        if wanted.is_file():
            return path
        places = (folder / wanted for folder in file.resolve().parents)
        return next((str(place) for place in places if place.is_file()), None)

    return find


def _listed(outcomes: Sequence[ArgumentOutcome]) -> str:
    return "".join(f"\n  {outcome.argument}: {outcome.text}" for outcome in outcomes) + "\n"
