"""Data sets, their packing and their template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytune_llm.data.readers import declarations
from raytune_llm.data.templates import named as named_templates
from raytune_llm.errors import UserError
from raytune_llm.migrate.argument_rules import NoEffect, Refusal, Settings
from raytune_llm.migrate.rules.values import LATER, Find, listed


def numbers(interleave_probs: str | Sequence[float] | None) -> list[float] | None:
    return None if interleave_probs is None else [float(value) for value in listed(interleave_probs)]


def data_sets(
    dataset: str | Sequence[str] | None, dataset_dir: str, dataset_info: str | None, media_dir: str | None, stage: str, find: Find
) -> Settings:
    if dataset is None:
        raise Refusal("must name the data sets to train on", "dataset")
    names = listed(dataset)
    if dataset_info is None and dataset_dir == "ONLINE":
        return _hub_data(names)
    path, here = _declaration(dataset_dir, dataset_info, find)
    if here:
        _check(path, names, stage, "dataset")
    return {"data": "alpaca", "data.path": None, "data.dataset_info": path, "data.names": names}


def held_out(
    eval_dataset: str | Sequence[str] | None,
    val_size: float,
    eval_strategy: str,
    dataset_dir: str,
    dataset_info: str | None,
    stage: str,
    find: Find,
) -> Settings:
    if eval_dataset is not None and val_size:
        raise Refusal("can't be combined with val_size", "eval_dataset")
    names = [] if eval_dataset is None else listed(eval_dataset)
    if eval_strategy != "no" and not (val_size or names):
        raise Refusal("needs rows to evaluate on; set val_size or eval_dataset", "eval_strategy")
    if names and dataset_info is None and dataset_dir == "ONLINE":
        return {"data.eval_fraction": 0.0, "data.eval_path": {name: name for name in names}}
    if names:
        path, here = _declaration(dataset_dir, dataset_info, find)
        if here:
            _check(path, names, stage, "eval_dataset")
    if val_size > 1:  # so many rows
        return {"data.eval_fraction": 0.0, "data.eval_rows": int(val_size), "data.eval_names": names}
    return {"data.eval_fraction": float(val_size), "data.eval_names": names}


def _declaration(dataset_dir: str, dataset_info: str | None, find: Find) -> tuple[str, bool]:
    """The dataset_info.json of a run, as it can be written into an experiment, and whether it is here."""
    if dataset_info is None and dataset_dir.startswith("REMOTE:"):
        hub_id = dataset_dir.removeprefix("REMOTE:")
        raise Refusal(f"fetch {hub_id} to a folder and import with dataset_info=FOLDER", "dataset_dir")
    wanted = dataset_info or dataset_dir
    if not wanted.endswith(".json"):
        wanted = str(Path(wanted, "dataset_info.json"))
    found = find(wanted)
    if dataset_info is not None and found is None:
        raise Refusal(f"there is no {wanted}", "dataset_info")
    return found or wanted, found is not None


def _check(path: str, names: Sequence[str], stage: str, argument: str) -> None:
    """Check that the entries are there and are of the kind that the stage trains on."""
    try:
        entries = declarations.from_dataset_info(path, list(names), media_dir=None, ranked=stage in ("dpo", "rm"))
    except UserError as error:
        raise Refusal(str(error), argument) from None
    for entry in entries:
        columns: Any = entry.format
        if any(getattr(columns, name) is not None for name in ("images", "videos", "audios")):
            raise Refusal(f"{entry.name} has images, videos or audio, and training on them (vision) {LATER}", argument)
        if stage == "kto" and columns.label is None:
            raise Refusal(f"{entry.name} has no column kto_tag, which stage=kto needs", argument)


def _hub_data(names: Sequence[str]) -> Settings:
    """One data set of the hub, whose columns have LLaMA-Factory's names."""
    if len(names) > 1:
        raise Refusal(
            "several data sets of the hub need a dataset_info.json (hf_hub_url); import with dataset_info=FILE", "dataset"
        )
    absent = dict.fromkeys((f"data.format.{name}" for name in ("system", "history", "tools", "images", "videos", "audios")), None)
    return {"data": "alpaca", "data.path": names[0], "data.dataset_info": None, "data.names": [], **absent}


def packing(stage: str, packing: bool | None, neat_packing: bool) -> Settings:
    if stage not in ("sft", "pt"):
        return {"data.packing": False}
    return {"data.packing": bool(packing or neat_packing or (packing is None and stage == "pt"))}


def max_length(cutoff_len: int, stage: str, packing: bool | None) -> Settings:
    """Sets the length, and LLaMA-Factory's way of cutting rows to it. Texts that are packed end to end are not cut."""
    if stage == "pt" and packing is not False:
        return {"data.max_length": cutoff_len}
    return {"data.max_length": cutoff_len, "data.overlong": "llamafactory"}


def streaming(streaming: bool, buffer_size: int, dataset: str | Sequence[str] | None, max_steps: int) -> Settings:
    if not streaming:
        return {"data.streaming": False}
    if max_steps <= 0:
        raise Refusal("needs max_steps", "streaming")
    if dataset is not None and len(listed(dataset)) > 1:
        raise Refusal("several data sets can't be streamed; without streaming they are tokenized once, on all cores", "streaming")
    return {"data.streaming": True, "data.streaming_buffer_rows": buffer_size}


def template(
    stage: str,
    template: str | None,
    tool_format: str | None,
    default_system: str | None,
    enable_thinking: bool | None,
    preserve_thinking: bool,
) -> Settings | NoEffect:
    if stage == "pt":
        return NoEffect("plain text has no template")
    if template is not None and template not in named_templates.names():
        raise Refusal(f"there is no such template; there are {', '.join(named_templates.names())}", "template")
    if tool_format is not None and template is None:
        raise Refusal("needs template: a tokenizer's own template has its own format", "tool_format")
    return {
        "data.template": template,
        "data.tool_format": tool_format,
        "data.default_system": default_system,
        "data.enable_thinking": enable_thinking,
        "data.preserve_thinking": preserve_thinking,
    }
