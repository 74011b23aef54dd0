"""Hydra composes, pydantic validates: overrides in, one frozen run out. The only file that knows Hydra.

Mistakes leave as ConfigError, with the dotted path and, for a name that is nearly right, the name that was meant.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import main as hydra_main
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from yaml import YAMLError

from raytune_llm.config.overrides import CONF
from raytune_llm.config.run import RUNS
from raytune_llm.config.space import Choice, Interval, Values
from raytune_llm.errors import NOT_YAML, ConfigError, first_line

UNEXPECTED = ("unexpected_keyword_argument", "extra_forbidden")
"""How pydantic calls a setting that there is not."""
RENAMED = {"quantization.wide": "quantization.skip_modules"}
"""Settings of earlier versions, and what they are called now."""
SEVERAL = r"(choice|range|interval|tag|glob|sort|shuffle|int|float|str|bool)\("
"""How a value begins that stands for several: Hydra's functions."""
MAX_OPTION_CHARS = 200
"""An option is a file, whose name can be no longer than a file system allows."""
MAX_LISTED_OPTIONS = 60
"""More are not read to the end."""
EXAMPLES = CONF.parent / "examples"


def _example(name: str, *, _parent_: DictConfig) -> str | None:
    return None if _parent_.get("dataset_info") else str(EXAMPLES / name)


OmegaConf.register_new_resolver("examples", _example, replace=True)
"""${examples:rows.jsonl} in YAML is a file of examples/, which lies beside conf/; null in a section whose dataset_info takes its
place."""


def _with_examples(value: Any, otherwise: Any, *, _parent_: DictConfig) -> Any:
    path = _parent_.get("path")
    return value if path is not None and Path(str(path)).parent == EXAMPLES else otherwise


OmegaConf.register_new_resolver("with_examples", _with_examples, replace=True)
"""${with_examples:0.1,0.0} in YAML is 0.1 where the section's path is a file of examples/, and 0.0 where it is a user's own."""


def _with_loss(loss: str, value: Any, *, _parent_: DictConfig) -> Any:
    chosen = _parent_.get("loss")
    return value if loss == chosen or (isinstance(chosen, DictConfig) and loss in chosen) else None


OmegaConf.register_new_resolver("with_loss", _with_loss, replace=True)
"""${with_loss:eaft,1.0} in YAML is 1.0 where the section's loss is eaft, or a sum with it, and null beside another one."""


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
    "steps",
    "also",
)
"""Settings whose keys are the user's, or another program's."""


@dataclass(frozen=True)
class OfVerb:
    """Experiments that one verb alone can run."""

    section: str
    """That they have."""
    what: str
    varies_runs: bool
    """The verb also takes experiments of train."""


OF_VERBS = {"tune": OfVerb("tune", "sweep", True), "chain": OfVerb("steps", "chain of commands", False)}


def load_config(
    verb: str, overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, config_name: str | None = None
) -> Any:
    """The run that `python -m raytune_llm <verb> <overrides>` starts, of the class that RUNS has for the verb.

    config_dir adds a folder to the search path (its groups and experiments come beside ours); config_name takes another
    primary config than the verb's, say `run` from an output folder. Raises ConfigError.
    """
    return to_run(verb, compose(verb, overrides, config_dir=config_dir, config_name=config_name))


def to_run(verb: str, composed: DictConfig) -> Any:
    """A composed config as the verb's frozen dataclass."""
    try:
        values = OmegaConf.to_container(_without_hydra(composed), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "the config", f"can't be resolved: {first_line(error)}") from None
    return validate(RUNS[verb], cast(dict[str, Any], values))


def validate(kind: Any, values: dict[str, Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise _named(error, values) from None


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
        raise _explained(error, config_name or verb, overrides, config_dir) from None
    except NOT_YAML as error:
        if not isinstance(error, YAMLError | UnicodeDecodeError | RecursionError) and not _is_of_yaml(error):
            raise
        raise _unreadable(error, overrides, config_dir) from None


def _check_choices(overrides: Sequence[str], config_dir: str | Path | None) -> None:
    """That each group is given the name of an option, and each setting a name: Hydra would fail without a word on which."""
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
        chosen = _parsed(text).value() if _is_read(text) else value
        names = chosen if isinstance(chosen, list) else [chosen]
        if not (_is_sweep(chosen) or all(isinstance(name, str) and "\0" not in name for name in names)):
            there = f"There are: {listed(options(group, config_dir), ', ')}."
            raise ConfigError(group, "must be the name of one of its options", got=value, fix=there)


def _check_experiments(verb: str, overrides: Sequence[str], config_dir: str | Path | None) -> None:
    """That an experiment which is a sweep or a chain goes with the verb that runs it."""
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
    """Several values, for -m."""
    return type(value).__module__.startswith("hydra.")


def _is_of_yaml(error: Exception) -> bool:
    """It was raised where a file is read, not by us."""
    return any(frame.f_globals.get("__name__", "").startswith("yaml.") for frame, _ in traceback.walk_tb(error.__traceback__))


def _unreadable(error: Exception, overrides: Sequence[str], config_dir: str | Path | None) -> ConfigError:
    """A YAML file of the user's that can't be read."""
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
    """A run that is composed from the run.yaml of its output folder resumes in that folder, also after it was moved."""
    if config_dir is None or any(override.startswith("output_dir=") for override in overrides):
        return overrides
    folder = Path(config_dir).resolve()
    if not (folder / f"{config_name}.yaml").is_file() or not (folder / "checkpoints").is_dir():
        return overrides
    return [f"output_dir={quoted(str(folder))}", *overrides]


def quoted(text: str) -> str:
    """As Hydra's overrides take any text: a backslash is one of its own but before a quote."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}{escaped[len(escaped.rstrip(chr(92))) :]}'"


def as_typed(override: str, *, several: bool = False) -> str:
    """The override with what Hydra's grammar has no letters for in quotes: ~/rows.jsonl, données.jsonl, train[:10], a (1).jsonl.

    Lists and objects are read as YAML where Hydra can't. `several`: commas part values, as with -m. Raises ConfigError.
    """
    if not override.isprintable():
        _check_encoding(override)
    if _is_read(override):
        return override
    found = re.fullmatch(r"([+~]*[^=\s]+)=(.*)", override, re.DOTALL)
    if found is None or not _is_read(f"{found[1]}=1"):
        raise ConfigError("an override", "must read key=value", got=override, fix="See --help for the settings.")
    key, value = found[1], found[2].strip()
    if _is_open(value):
        fix = "Close the quote." if value.startswith(("'", '"')) else f"For example, '{key}=[a,b]'."
        raise ConfigError(key, "has a quote or a bracket that is not closed", got=value, fix=fix)
    if value.startswith(("[", "{")) and _is_read(literal := f"{key}={_literal(value)}"):
        return literal
    values = re.split(r",(?![^\[]*\])", value) if several else [value]
    return f"{key}={','.join(one if _is_read(f'{key}={one}') else quoted(one) for one in values)}"


def _check_encoding(override: str) -> None:
    """That its bytes were UTF-8: those that were not reach Python as surrogates, which no file and no JSON can hold."""
    try:
        override.encode()
    except UnicodeEncodeError:
        key, _, value = override.partition("=")
        fix = "Type it in UTF-8; a file with such a name must get another one."
        raise ConfigError(key, "must be text in UTF-8", got=value, fix=fix) from None


def swept(override: str) -> tuple[str, Values] | None:
    """The setting, with its plus signs, and the values that an override gives to it, where it gives several: 8,16,32,
    choice(8,16), range(0,4), interval(0,1), int(interval(8,64)), tag(log,interval(1e-5,1e-3)), glob(*) for options of a group."""
    key, _, value = override.partition("=")
    typed = as_typed(override, several=True)
    if not _is_read(typed) or (not _is_read(override) and re.match(SEVERAL, value)):
        fix = "Say, 8,16,32, range(0,4), interval(0,1) or tag(log,interval(1e-5,1e-3))."
        raise ConfigError(key.lstrip("+"), "has values that can't be read", got=value, fix=fix)
    read = _parsed(typed)
    if not read.is_sweep_override():
        return None
    setting = read.input_line.partition("=")[0] if read.input_line else read.key_or_group
    values = cast(Any, read.value())
    if isinstance(values, Glob):
        return setting, Choice(tuple(values.filter(options(read.key_or_group))))
    if isinstance(values, IntervalSweep):
        assert values.start is not None and values.end is not None
        whole = isinstance(values.start, int) and isinstance(values.end, int)
        return setting, Interval(values.start, values.end, log="log" in values.tags, whole=whole)
    return setting, Choice(tuple(_plain(value) for value in read.sweep_iterator()))


def one_value(override: str) -> tuple[str, Any]:
    """The setting, and the value that an override gives to it."""
    word = as_typed(override)
    read = _parsed(word)
    setting, _, value = word.partition("=")
    if read.is_sweep_override():
        raise ConfigError(setting, "must have one value here", got=value)
    return setting, _plain(read.value())


def _plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    return value


def as_override(setting: str, value: Any) -> str:
    """The word that gives a plain value to a setting."""
    return f"{setting}={_word(value)}"


def as_word(setting: str, value: Any) -> str:
    """The same as a user would type it: a text in quotes only where it would be read as something else (a,b is two values)."""
    word = f"{setting}={value}"
    try:
        read = one_value(word)[1]
    except ConfigError:
        read = None
    return word if read == value else as_override(setting, value)


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_word(item)}' for key, item in value.items())}}}"
    return quoted(value) if isinstance(value, str) else _shown(value)


def _is_read(override: str) -> bool:
    try:
        _parsed(override)
    except HydraException:
        return False
    return True


def _is_open(value: str) -> bool:
    """Whether it begins like a list, an object or a quoted text and has no end."""
    if value.startswith(("'", '"')):
        return len(value) == 1 or not value.endswith(value[0])
    return any(value.startswith(start) and value.count(start) > value.count(end) for start, end in ("[]", "{}"))


def _literal(value: str) -> str:
    """A list or an object as Hydra writes it, its texts in quotes; the value itself where it is no YAML."""
    try:
        return _in_hydras_words(yaml.load(value, yaml.BaseLoader))
    except YAMLError:
        return value


def _in_hydras_words(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_in_hydras_words, node))}]"
    if isinstance(node, dict):
        return f"{{{','.join(f'{key}:{_in_hydras_words(item)}' for key, item in node.items())}}}"
    is_text = not _is_read(f"key={node}") or isinstance(_parsed(f"key={node}").value(), str)
    return quoted(node) if is_text else node


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
    """Some settings take any key; Hydra asks for a plus sign where a key is new."""
    return f"++{override}" if re.match(rf"({'|'.join(map(re.escape, ANY_KEY))})[.=]", override) else override


def as_plain(run: Any) -> dict[str, Any]:
    """A run as dicts, lists and plain values."""
    return TypeAdapter(type(run)).dump_python(run, mode="json")


def to_yaml(run: Any) -> str:
    """The whole run as YAML that `--config-dir FOLDER --config-name NAME` composes back into the same run."""
    return OmegaConf.to_yaml(OmegaConf.create(as_plain(run)))


def to_yaml_text(values: dict[str, Any]) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(values))


def read_yaml(path: Path, *, setting: str) -> dict[str, Any]:
    """A YAML file with a mapping; numbers may be written as 1e-4. Raises ConfigError, which blames the setting for the path."""
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ConfigError(setting, f"must be a YAML file that can be read ({error.strerror})", got=str(path)) from None
    except (OmegaConfBaseException, *NOT_YAML) as error:
        raise ConfigError(setting, f"must be a YAML file: {first_line(error)}", got=str(path)) from None
    if not isinstance(read, dict):
        raise ConfigError(setting, "must be a YAML file with key: value lines", got=str(path))
    return {str(key): value for key, value in read.items()}


def options(group: str, config_dir: str | Path | None = None) -> list[str]:
    """What `group=` can be."""
    folders = [CONF / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders for file in folder.glob("[!_]*.yaml")})


def listed(found: Sequence[str], separator: str = " ") -> str:
    """A group's options: all, or where they are too many to read, some and where the rest is."""
    if len(found) <= MAX_LISTED_OPTIONS:
        return separator.join(found) or "none"
    return f"{separator.join(found[:: len(found) // 8])}, and others ({len(found)} in all, in docs/models.md)"


def of_verbs(config_dir: str | Path | None = None) -> dict[str, str]:
    """Experiment -> the verb that it goes with alone; those of `train`, `plan` and `submit` are not here."""
    folders = [CONF / "experiment", *([Path(config_dir) / "experiment"] if config_dir else [])]
    files = [file for folder in folders for file in folder.glob("[!_]*.yaml")]
    texts = {file.stem: file.read_text(encoding="utf-8", errors="replace") for file in sorted(files)}
    return {
        name: verb
        for name, text in texts.items()
        for verb, special in OF_VERBS.items()
        if re.search(rf"^{special.section}:", text, re.M)
    }


def sweeps(config_dir: str | Path | None = None) -> list[str]:
    """The experiments of the verb tune."""
    return sorted(name for name, verb in of_verbs(config_dir).items() if verb == "tune")


def groups() -> list[str]:
    """What can be chosen: model, data, ..., experiment."""
    return sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def defaults(verb: str) -> list[str]:
    """`setting: value` lines of a verb's config as it composes without overrides."""
    composed = OmegaConf.to_container(_without_hydra(_compose(verb, [], None)), resolve=False)
    return [f"{path}: {_shown(value)}" for path, value in flat_items(composed)]


def run_under_hydra(
    verb: str,
    overrides: list[str],
    flags: list[str],
    verb_main: Callable[[Any], int],
    *,
    config_dir: str | None = None,
    config_name: str | None = None,
) -> int:
    """Let Hydra read its own flags. With -m each job gets a folder of its own in output_dir, named by its overrides."""
    several = "-m" in flags or "--multirun" in flags
    overrides = _where_it_lies(config_name or verb, [as_typed(one, several=several) for one in overrides], config_dir)
    if not several:
        compose(verb, overrides, config_dir=config_dir, config_name=config_name)  # our errors before Hydra's
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
    os.environ["HYDRA_FULL_ERROR"] = "1"  # leave errors to us
    try:
        hydra_main(version_base="1.3", config_path=str(CONF), config_name=verb)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(error, config_name or verb, overrides, config_dir) from None
    finally:
        sys.argv = before
        if before_env is None:
            del os.environ["HYDRA_FULL_ERROR"]
    return failed[0] if failed else 0


def _without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def flat_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by dotted path, with its value."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every setting and every section, by dotted path."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")


def _explained(error: Exception, config_name: str, overrides: list[str], config_dir: str | Path | None) -> ConfigError:
    """Hydra's complaint in our form."""
    text = str(error)
    if match := re.search(r"[Cc]ould not override '([^']+)'", text):
        return _unknown_key(match[1], _known_keys(config_name, overrides, config_dir), _verb_of(config_name))
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        found = options(group, config_dir)
        started = [one for one in found if one.startswith(f"{option}_")]
        near = started or difflib.get_close_matches(option, found, n=1)
        fix = f"Did you mean {group}={' or '.join(near)}?" if near else f"There are: {listed(found, ', ')}."
        return ConfigError(f"{group}", "must be one of its options", got=option, fix=fix)
    if match := re.search(r"Cannot find primary config '([^']+)'", text):
        return ConfigError("--config-name", f"must be a YAML file of {config_dir or CONF}", got=match[1])
    if match := re.search(r"Key '([^']+)' is not in struct|Key '([^']+)' not in", text):
        key = getattr(error, "full_key", None) or match[1] or match[2]
        return _unknown_key(key, _known_keys(config_name, overrides, config_dir), _verb_of(config_name))
    if (
        "LexerNoViableAlt" in text
        or "mismatched input" in text
        or "Error parsing override" in text
        or "no viable alternative" in text
        or "token recognition" in text
    ):
        match = re.search(r"Error parsing override '([^']*)'", text)
        got = match[1] if match else " ".join(overrides)
        return ConfigError(
            "an override", "must read key=value", got=got, fix="Quote values with spaces or brackets: 'key=[a,b]'."
        )
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.*)'", text):
        fix = f'Add -m for a run of each, or write "{match[1]}={quoted(match[2])}" where it is one.'
        return ConfigError(match[1], "has several values", got=match[2], fix=fix)
    if match := re.search(r"Multiple values for (\S+?)[.\s]", text):
        return ConfigError(match[1], "was chosen twice", fix="Choose it once.")
    if match := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return ConfigError(match[1], "exists already", fix=f"Write {match[1]}=... without the plus sign.")
    if match := re.search(r"Could not delete from config. The value of '([^']+)' is", text):
        return ConfigError(match[1], "is removed by its name alone", fix=f"Write ~{match[1]}.")
    if match := re.search(r"Override (\S+?)@(\S*?)=.*looks like a config group override", text, re.DOTALL):
        fix = f"Write {match[1]}=... without the @."
        return ConfigError(match[1], "is no group of options, which alone can have an @", got=f"{match[1]}@{match[2]}", fix=fix)
    if match := re.search(r"Could not delete from config. '([^']+)'", text):
        return ConfigError(match[1], "can't be removed: it is not in the config", fix="Leave it out.")
    if match := re.search(r"Error merging override (?:\+\+)?([\w.]+)=(.*?)\.?(?:\n|$)", text):
        return ConfigError(match[1], "can't have this value", got=match[2], fix="`--cfg job` shows its current value.")
    return ConfigError("the config", f"can't be composed: {_reason(error)}")


def _verb_of(config_name: str) -> str:
    return config_name if config_name in RUNS else "train"


def _unknown_key(key: str, known: list[str], verb: str = "train") -> ConfigError:
    if key in RENAMED:
        return ConfigError(key, f"has another name now, {RENAMED[key]}", fix=f"Write {RENAMED[key]}=...")
    if key == "experiment":
        fix = "Let the file begin with the line `# @package _global_`, and with `key: value` lines below it."
        return ConfigError("+experiment", "must be a file of settings for the whole run", fix=fix)
    if elsewhere := _options_with(key):
        group, chosen = key.partition(".")[0], " or ".join(elsewhere)
        return ConfigError(key, f"is no setting of the {group} that is chosen", fix=f"It is one of {chosen}.")
    known = [name for name in known if name != key and not name.startswith((f"{key}.", "hydra"))]
    near = difflib.get_close_matches(key, known, n=1) or _same_last_part(key, known)
    fix = f"Did you mean {near[0]}?" if near else f"`python -m raytune_llm {verb} --cfg job` shows every setting."
    return ConfigError(key, "is no setting", fix=fix)


def _options_with(key: str) -> list[str]:
    """group=option of each option that has this setting."""
    group, _, name = key.partition(".")
    if not name or group not in groups():
        return []
    return [f"{group}={option}" for option in options(group) if name in read_yaml(CONF / group / f"{option}.yaml", setting=group)]


def _same_last_part(key: str, known: list[str]) -> list[str]:
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.75)
    return [last[name] for name in near]


def _known_keys(config_name: str, overrides: list[str], config_dir: str | Path | None) -> list[str]:
    """The settings that exist under the chosen options, whatever else is wrong."""
    choices = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue
        if "." not in override.key_or_group and (override.key_or_group == "experiment" or override.key_or_group in groups()):
            choices.append(text)
    for attempt in (choices, []):
        try:
            composed = _compose(config_name, attempt, config_dir)
        except (HydraException, OmegaConfBaseException):
            continue
        return list(_flat_keys(OmegaConf.to_container(composed, resolve=False)))
    return []


def _of_other_options(keys: Sequence[str], values: Mapping[str, Any]) -> ConfigError | None:
    """The error about keys[0] where the chosen option of its group lacks that setting and other options have it. Keys of the same
    kind are named together: an experiment may have set them, for one of those options."""
    group = keys[0].partition(".")[0]
    settings = {f"{group}={option}": read_yaml(CONF / group / f"{option}.yaml", setting=group) for option in options(group)}
    owners = {key: [option for option, own in settings.items() if key.partition(".")[2] in own] for key in keys}
    found = [key for key in keys if key.startswith(f"{group}.") and owners[key]]
    if keys[0] not in found or "name" not in values[group]:
        return None
    chosen, others = f"{group}={values[group]['name']}", " or ".join(sorted({option for key in found for option in owners[key]}))
    if len(found) == 1:
        fix = f"It is one of {others}. Where an experiment sets it, add ~{keys[0]}."
        return ConfigError(keys[0], f"is no setting of {chosen}", got=values[group][keys[0].partition(".")[2]], fix=fix)
    fix = f"They are of {others}. Where an experiment sets them, add {' '.join(f'~{key}' for key in found)}."
    return ConfigError(f"{', '.join(found[:-1])} and {found[-1]}", f"are no settings of {chosen}", fix=fix)


def _named(error: ValidationError, values: dict[str, Any]) -> ConfigError:
    """The first of pydantic's complaints as setting, rule, value; settings that do not belong there all together."""
    complaints: list[Any] = error.errors(include_url=False)
    first: dict[str, Any] = complaints[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    setting, fix = _path(first, values), ""
    match first["type"]:
        case "missing":
            return ConfigError(setting, "must be given")
        case kind if kind in UNEXPECTED:
            unexpected = [_path(complaint, values) for complaint in complaints if complaint["type"] in UNEXPECTED]
            return _of_other_options(unexpected, values) or _unknown_key(setting, list(_flat_keys(values)))
        case "string_type" if isinstance(first["input"], int | float) and not setting.rpartition(".")[2].isdigit():
            fix = f"Quote it twice: \"{setting}='{_shown(first['input'])}'\"."
        case "literal_error":
            known = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            near = difflib.get_close_matches(str(first["input"]), known, n=1)
            fix = f"Did you mean {near[0]}?" if near else ""
        case "union_tag_not_found":
            there = ", ".join(options(setting)) if setting in groups() else ""
            return ConfigError(setting, "must be one of its options", got="none", fix=f"There are: {there}." if there else "")
        case "union_tag_invalid":
            expected = first["ctx"]["expected_tags"].replace("'", "")
            return ConfigError(f"{setting}.name", f"must be one of {expected}", got=first["ctx"]["tag"])
    ways = [_rule(one) for one in complaints if _path(one, values) == setting and one["type"] not in UNEXPECTED]
    if len(dict.fromkeys(ways)) > 1:
        return ConfigError(setting, "must be " + " or ".join(dict.fromkeys(ways)), got=first["input"], fix=fix)
    rule = _in_words(first["msg"].replace("Input should be", "must be"))
    rule = re.sub(r"must be a valid (\w+)", lambda m: f"must be {_article(m[1])}", rule)
    return ConfigError(setting, rule, got=first["input"], fix=fix)


def _rule(complaint: Mapping[str, Any]) -> str:
    """What it asks for, without the verb."""
    match complaint["type"]:
        case "literal_error":
            return complaint["ctx"]["expected"].replace("'", "")
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "list_type":
            return "a list ([a,b])"
        case "dict_type" | "dataclass_type":
            return "an object"
        case "int_type" | "int_from_float" | "int_parsing":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "string_type":
            return "text"
        case "none_required":
            return "null"
    return _in_words(complaint["msg"].removeprefix("Input should be "))


def _in_words(rule: str) -> str:
    rule = rule.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return rule.replace("less than", "below").replace("greater than", "above")


def _path(complaint: Mapping[str, Any], values: Any) -> str:
    """The dotted path of the setting that pydantic complains of."""
    path: list[str] = []
    node, places = values, complaint["loc"]
    for part in places:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = node[part]
        elif complaint["type"] not in {"missing", *UNEXPECTED} or part != places[-1]:
            continue  # the tag of a union, not a key
        path.append(str(part))
    return ".".join(path)


def _article(noun: str) -> str:
    noun = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "array": "list"}.get(
        noun, noun
    )
    return noun if noun in ("text", "true or false") else f"a {noun}"


__all__ = [
    "CONF",
    "as_plain",
    "compose",
    "defaults",
    "flat_items",
    "groups",
    "listed",
    "load_config",
    "options",
    "quoted",
    "run_under_hydra",
    "to_run",
    "to_yaml",
    "validate",
]


def _reason(error: Exception) -> str:
    """Hydra says where in the first line, and what in the second."""
    where, _, what = str(error).strip().partition("\n")
    return f"{where} {what.strip().partition(chr(10))[0]}".rstrip(" .") if where.endswith(":") else first_line(error)
