"""Turns overrides into a frozen run: Hydra composes the config, pydantic validates it. Only override_syntax.py and plain.py also
use Hydra.

Every mistake is raised as a ConfigError with the setting's dotted path; for a misspelled name it suggests the right one.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from hydra import main as hydra_main
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import YAMLError

from raytune_llm.config import mistakes
from raytune_llm.config.options import OF_VERBS, groups, listed, of_verbs, options
from raytune_llm.config.override_syntax import as_typed, is_read, parsed, quoted
from raytune_llm.config.overrides import CONF
from raytune_llm.config.paths import check_addresses
from raytune_llm.config.plain import as_text, flat_items, flat_keys
from raytune_llm.config.run import RUNS
from raytune_llm.config.section import validator_of
from raytune_llm.errors import NOT_YAML, ConfigError, first_line

Composed = DictConfig
"""A composed config that is not validated yet."""

MAX_OPTION_CHARS = 200
"""Maximum length of an option's name. An option is a file, and file systems limit the length of names."""


EXAMPLES = CONF.parent / "examples"


def _example(name: str, *, _parent_: DictConfig) -> str | None:
    return None if _parent_.get("dataset_info") else str(EXAMPLES / name)


OmegaConf.register_new_resolver("examples", _example, replace=True)
"""${examples:rows.jsonl} in YAML is the path of a file in examples/, or null if the section has a dataset_info instead."""


def _with_examples(value: Any, otherwise: Any, *, _parent_: DictConfig) -> Any:
    path = _parent_.get("path")
    return value if path is not None and Path(str(path)).parent == EXAMPLES else otherwise


OmegaConf.register_new_resolver("with_examples", _with_examples, replace=True)
"""${with_examples:0.1,0.0} in YAML is 0.1 if the section's path is a file in examples/, else 0.0."""


def _with_loss(loss: str, value: Any, *, _parent_: DictConfig) -> Any:
    chosen = _parent_.get("loss")
    return value if loss == chosen or (isinstance(chosen, DictConfig) and loss in chosen) else None


OmegaConf.register_new_resolver("with_loss", _with_loss, replace=True)
"""${with_loss:eaft,1.0} in YAML is 1.0 if the section's loss is eaft or a sum that includes it, else null."""


ANY_KEY = (
    "model.config",
    "tune.space",
    "adapter.rank_pattern",
    "adapter.alpha_pattern",
    "optimizer.groups",
    "serve.adapters",
    "chat.adapters",
    "predict.adapters",
    "export.adapters",
    "export.weights",
    "submit.env",
    "steps",
    "also",
)
"""Settings that are mappings with keys of the user's choice, or keys of another program."""


def load_config(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str | None = None
) -> Any:
    """The run that `python -m raytune_llm <verb> <overrides>` starts. Its class is RUNS[verb]. Raises ConfigError.

    config_dir: a folder with more groups and experiments. config_name: another primary config than the verb's own, for example
    `run` in an output folder.
    """
    return to_run(verb, compose(verb, overrides, config_dir=config_dir, config_name=config_name))


def load_text(verb: str, text: str, overrides: Sequence[str] = ()) -> Any:
    """`load_config` of a primary config that is in no file. (Hydra reads files only; this one is gone again at once.)"""
    with TemporaryDirectory(prefix="raytune-llm-") as folder:
        (Path(folder) / "run.yaml").write_text(text)
        return load_config(verb, overrides, config_dir=folder, config_name="run")


def to_run(verb: str, composed: DictConfig) -> Any:
    """A composed config as the verb's frozen dataclass."""
    try:
        settings = _without_hydra(composed) if "hydra" in composed else composed
        values = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "the config", f"can't be resolved: {first_line(error)}") from None
    run = validate(RUNS[verb], cast(dict[str, Any], values))
    check_addresses(run)
    return run


def section_of(composed: Composed, name: str) -> dict[str, Any]:
    """A section of a composed config as plain values, which nobody has looked at."""
    found = OmegaConf.to_container(OmegaConf.select(composed, name) or OmegaConf.create({}))
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def choices_of(composed: Composed) -> dict[str, Any]:
    """Group -> the option that was chosen."""
    return section_of(composed, "hydra.runtime.choices")


def validate(kind: Any, values: dict[str, Any]) -> Any:
    try:
        return validator_of(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise mistakes.from_pydantic(error, values) from None


def compose(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str | None = None
) -> DictConfig:
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError("--config-dir", "must be a folder", got=str(config_dir))
    overrides = _where_it_lies(config_name or verb, [as_typed(override) for override in overrides], config_dir)
    _check_choices(overrides, config_dir)
    _check_experiments(verb, overrides, config_dir)
    try:
        return _compose(config_name or verb, overrides, config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise mistakes.from_hydra(
            error, config_name or verb, overrides, config_dir, lambda: _known_keys(config_name or verb, overrides, config_dir)
        ) from None
    except NOT_YAML as error:
        if not isinstance(error, YAMLError | UnicodeDecodeError | RecursionError) and not _is_of_yaml(error):
            raise
        raise _unreadable(error, overrides, config_dir) from None


def changed(composed: DictConfig, config_name: str, overrides: Sequence[str]) -> DictConfig:
    """A composed config with more overrides of settings (not of groups). The result is the same as composing with them, since
    Hydra sets values after all options are chosen, but it takes a tenth of the time. Raises ConfigError."""
    overrides = [as_typed(override) for override in overrides]
    _check_choices(overrides, None)
    copied = _without_hydra(composed)
    OmegaConf.set_struct(copied, True)  # as in Hydra, so that unknown settings are refused
    try:
        ConfigLoaderImpl._apply_overrides_to_config([parsed(_free(override)) for override in overrides], copied)
    except (HydraException, OmegaConfBaseException) as error:
        raise mistakes.from_hydra(error, config_name, overrides, None, lambda: _keys_of(composed)) from None
    return copied


def _check_choices(overrides: Sequence[str], config_dir: str | Path | None) -> None:
    """Raises ConfigError if a group is given something that is not an option, or if an override has no setting. Hydra's own
    errors don't say which override is wrong."""
    for text in overrides:
        key, sign, value = text.partition("=")
        group = key.lstrip("+~").partition("@")[0]
        if sign and not group:
            raise ConfigError("an override", "must read key=value", got=text, fix="See --help for the settings.")
        if len(value) > MAX_OPTION_CHARS and (group == "experiment" or group in groups()):
            raise ConfigError(
                group, "must be the name of an option", got=f"{value[:40]}...", fix="See --help for those that there are."
            )
        if sign and group == "hydra":
            raise ConfigError("hydra", "is no group of options", got=text, fix="Settings of Hydra read hydra.run.dir=...")
        if not sign or "." in group or group not in groups():
            continue
        if key.startswith("~"):
            raise ConfigError(group, "is removed by its name alone", got=text, fix=f"Write ~{group}.")
        if group == "experiment" and not key.startswith("+"):
            raise ConfigError("experiment", "is added with a plus sign", got=text, fix=f"Write +{text}.")
        chosen = parsed(text).value() if is_read(text) else value
        names = chosen if isinstance(chosen, list) else [chosen]
        if not (_is_sweep(chosen) or all(isinstance(name, str) and "\0" not in name for name in names)):
            there = f"There are: {listed(options(group, config_dir), ', ')}."
            raise ConfigError(group, "must be the name of one of its options", got=value, fix=there)


def _check_experiments(verb: str, overrides: Sequence[str], config_dir: str | Path | None) -> None:
    """Raises ConfigError if an experiment is a sweep or a chain and the verb can't run it."""
    chosen = [text.partition("=")[2] for text in overrides if text.startswith("+experiment=")]
    special = of_verbs(config_dir) if chosen else {}
    for experiment in sorted(set(chosen)):
        wanted = special.get(experiment, verb)
        if verb in OF_VERBS and not OF_VERBS[verb].varies_runs and experiment not in special:
            known = ", ".join(name for name, other in special.items() if other == verb)
            raise ConfigError("+experiment", f"is no {OF_VERBS[verb].what}", got=experiment, fix=f"There are: {known}.")
        if wanted != verb:
            fix = f"Write python -m raytune_llm {wanted} +experiment={experiment}."
            raise ConfigError("+experiment", f"is a {OF_VERBS[wanted].what}, which {verb} can't run", got=experiment, fix=fix)


def _is_sweep(value: Any) -> bool:
    """Whether a value stands for several (for -m)."""
    return type(value).__module__.startswith("hydra.")


def _is_of_yaml(error: Exception) -> bool:
    """Whether the error was raised while a YAML file was parsed."""
    return any(frame.f_globals.get("__name__", "").startswith("yaml.") for frame, _ in traceback.walk_tb(error.__traceback__))


def _unreadable(error: Exception, overrides: Sequence[str], config_dir: str | Path | None) -> ConfigError:
    """The error for a YAML file of the user's that can't be read."""
    if isinstance(error, RecursionError):
        chosen = [text for text in overrides if text.lstrip("+").partition("=")[0] in groups()]
        return ConfigError("the config", "includes itself", got=" ".join(chosen), fix="Remove it from its own `defaults`.")
    if isinstance(error, UnicodeDecodeError):
        for file in sorted(Path(config_dir or CONF).rglob("*.yaml")):
            try:
                file.read_text(encoding="utf-8")
            except UnicodeDecodeError as found:
                return ConfigError(
                    "--config-dir", f"must hold files in UTF-8 ({found.reason})", got=str(file), fix="Save it as UTF-8."
                )
    mark = getattr(error, "problem_mark", None)
    place = f"{mark.name}, line {mark.line + 1}" if mark is not None else str(config_dir)
    what = getattr(error, "problem", None) or first_line(error)
    return ConfigError("--config-dir", f"must hold YAML files: {what}", got=place, fix="Correct the file.")


def _where_it_lies(config_name: str, overrides: list[str], config_dir: str | Path | None) -> list[str]:
    """The overrides, with output_dir set to config_dir if that is an output folder: a run resumes where its run.yaml lies, also
    after the folder was moved."""
    if config_dir is None or any(override.startswith("output_dir=") for override in overrides):
        return overrides
    folder = Path(config_dir).resolve()
    if not (folder / f"{config_name}.yaml").is_file() or not (folder / "checkpoints").is_dir():
        return overrides
    return [f"output_dir={quoted(str(folder))}", *overrides]


def _compose(config_name: str, overrides: list[str], config_dir: str | Path | None) -> DictConfig:
    search_path = create_config_search_path(str(CONF))
    if config_dir is not None:
        search_path.prepend("command-line", f"file://{Path(config_dir).resolve()}", SearchPathQuery(provider="schema"))
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("raytune_llm", search_path)
    try:
        return hydra.compose_config(
            config_name=config_name,
            overrides=[_free(override) for override in overrides],
            run_mode=RunMode.RUN,
            from_shell=False,
            with_log_configuration=False,
        )
    finally:
        GlobalHydra.instance().clear()


def _free(override: str) -> str:
    """The override, with the plus sign that Hydra demands for a new key if it is under one of ANY_KEY."""
    return f"++{override}" if re.match(rf"({'|'.join(map(re.escape, ANY_KEY))})[.=]", override) else override


def defaults(verb: str) -> list[str]:
    """The `setting: value` lines of a verb's config without overrides."""
    composed = OmegaConf.to_container(_without_hydra(_compose(verb, [], None)), resolve=False)
    return [f"{path}: {as_text(value)}" for path, value in flat_items(composed)]


def run_under_hydra(
    verb: str,
    overrides: list[str],
    flags: list[str],
    verb_main: Callable[[Any], int],
    *,
    config_dir: str | None = None,
    config_name: str | None = None,
) -> int:
    """Run the verb under Hydra, which reads its own flags. With -m, each job gets a folder in output_dir that is named after its
    overrides."""
    several = "-m" in flags or "--multirun" in flags
    overrides = _where_it_lies(config_name or verb, [as_typed(one, several=several) for one in overrides], config_dir)
    if not several:
        compose(verb, overrides, config_dir=config_dir, config_name=config_name)  # raises our errors, not Hydra's
    failed: list[int] = []

    def job(composed: DictConfig) -> None:
        hydra = HydraConfig.get()
        if hydra.mode == RunMode.MULTIRUN and "output_dir" in composed:
            with open_dict(composed):
                swept = [override for override in hydra.overrides.task if override not in overrides]
                composed.output_dir = f"{composed.output_dir}/{','.join(swept).replace('/', '_')}"
        code = verb_main(to_run(verb, composed))
        if code:
            failed.append(code)

    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    sweep = ["hydra.sweep.dir=${output_dir}", "hydra.sweep.subdir=."] if verb == "train" else []
    place = (["--config-dir", str(Path(config_dir).resolve())] if config_dir else []) + (
        ["--config-name", config_name] if config_name else []
    )
    before, before_env = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["raytune_llm", *place, *flags, *map(_free, overrides), *quiet, *sweep]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises errors instead of printing them
    try:
        hydra_main(version_base="1.3", config_path=str(CONF), config_name=verb)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise mistakes.from_hydra(
            error, config_name or verb, overrides, config_dir, lambda: _known_keys(config_name or verb, overrides, config_dir)
        ) from None
    finally:
        sys.argv = before
        if before_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
    return failed[0] if failed else 0


def _without_hydra(composed: DictConfig) -> DictConfig:
    """A copy of the config without Hydra's own node."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def _known_keys(config_name: str, overrides: list[str], config_dir: str | Path | None) -> list[str]:
    """The settings that exist under the chosen options, even if other overrides are wrong."""
    choices = []
    for text in overrides:
        try:
            override = parsed(text)
        except HydraException:
            continue
        if "." not in override.key_or_group and (override.key_or_group == "experiment" or override.key_or_group in groups()):
            choices.append(text)
    for attempt in (choices, []):
        try:
            composed = _compose(config_name, attempt, config_dir)
        except (HydraException, OmegaConfBaseException):
            continue
        return _keys_of(composed)
    return []


def _keys_of(composed: DictConfig) -> list[str]:
    return list(flat_keys(OmegaConf.to_container(composed, resolve=False)))
