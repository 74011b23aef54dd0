"""Parses a command line into verb, overrides and Hydra's own flags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from raytune_llm.config import sweep
from raytune_llm.config.load import load_config, load_text, run_under_hydra
from raytune_llm.config.override_syntax import quoted
from raytune_llm.config.packed import unpack
from raytune_llm.config.run import RUNS
from raytune_llm.errors import ConfigError

HYDRA_FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("--package", "-p", "--config-path", "-cp", "--experimental-rerun"), ()),
    **dict.fromkeys(("--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--hydra-help", "--version")),
}
"""Hydra's own flags -> the values that may follow: none (None), one of these, or any one (empty tuple)."""
OWN_FLAGS = {"tune": {"--dry-run": "tune.dry_run=true"}}
"""Flags of a verb that stand for an override."""
WITHOUT_A_KEY = {"import": ("file",), "jobs": ("action", "job")}
"""Verb -> the settings that its positional words set, in order."""
LISTS = {"compare": "runs"}
"""Verb -> the setting that takes all of its positional words as a list."""


@dataclass(frozen=True)
class Call:
    verb: str
    overrides: list[str]
    config_dir: str | None
    config_name: str | None
    hydra_flags: list[str]
    """Hydra's own flags other than --config-dir and --config-name. If there are any, Hydra runs the command."""
    config_env: str | None = None
    """The environment variable that holds the primary config (config/packed.py)."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("the command line", f"can't be read: {message}", fix="See --help.")


def parse(verb: str, argv: list[str]) -> Call:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-env")
    known, rest = parser.parse_known_args(argv)
    flags: list[str] = []
    overrides: list[str] = []
    positional = 0
    listed: list[str] = []
    words = iter(rest)
    for word in words:
        if not word.startswith("-"):
            if verb in LISTS and not _is_override(word):
                listed.append(word)
                continue
            if verb not in WITHOUT_A_KEY or word.startswith(("+", "~")) or _is_override(word):
                overrides.append(word)
                continue
            overrides.append(f"{_setting_at(verb, positional, word)}={quoted(word)}")
            positional += 1
            continue
        if word in OWN_FLAGS.get(verb, {}):
            overrides.append(OWN_FLAGS[verb][word])
            continue
        flag, sign, value = word.partition("=")
        if flag not in HYDRA_FLAGS:
            near = get_close_matches(
                flag, [*HYDRA_FLAGS, *OWN_FLAGS.get(verb, ()), "--config-dir", "--config-name", "--help"], n=1
            )
            fix = f"Did you mean {near[0]}?" if near else "See --help."
            raise ConfigError("the command line", "has no such flag", got=word, fix=fix)
        flags.append(word)
        allowed = HYDRA_FLAGS[flag]
        if allowed is not None and not sign:
            value = next(words, "")
            flags.append(value)
        if allowed and value not in allowed:
            raise ConfigError(flag, f"must be followed by {', '.join(allowed)}", got=value or "nothing")
    if listed:
        overrides.append(f"{LISTS[verb]}=[{','.join(map(quoted, listed))}]")
    _check_together(flags)
    return Call(verb, overrides, known.config_dir, known.config_name, flags, known.config_env)


def _is_override(word: str) -> bool:
    """Whether a word is key=value. A path such as sweep/trials/000_lr=0.001 is not, since no setting has a slash in its name."""
    key, sign, _ = word.partition("=")
    return bool(sign) and "/" not in key and not Path(word).exists()


def _check_together(flags: list[str]) -> None:
    shows = [
        flag for flag in flags if flag in ("--cfg", "-c", "--info", "-i", "--run", "-r", "--multirun", "-m", "--shell-completion")
    ]
    if len(shows) > 1:
        raise ConfigError("the command line", "can have one of these flags", got=" ".join(shows), fix="Remove one.")
    if "--resolve" in flags and not {"--cfg", "-c"} & set(flags):
        raise ConfigError("--resolve", "goes with --cfg job", fix="Write --cfg job --resolve.")


def _setting_at(verb: str, place: int, word: str) -> str:
    settings = WITHOUT_A_KEY[verb]
    if place >= len(settings):
        raise ConfigError("the command line", f"has one {settings[-1]} after {verb}", got=word, fix="Choose one at a time.")
    return settings[place]


def load(call: Call) -> Any:
    if call.verb == sweep.VERB and call.overrides[:1] == ["resume"]:
        return sweep.load_paused(call.overrides[1:])
    if call.verb == "submit" and call.overrides and call.overrides[0] in RUNS:
        return _load_submitted(call)
    if call.verb == sweep.VERB:
        return sweep.load_sweep(call.overrides, config_dir=call.config_dir, config_name=call.config_name)
    if call.config_env is not None:
        return load_text(call.verb, unpack(call.config_env), call.overrides)
    return load_config(call.verb, call.overrides, config_dir=call.config_dir, config_name=call.config_name)


def _load_submitted(call: Call) -> Any:
    """`submit train ...` is `submit ...`. Raises ConfigError for a verb that is no run and no sweep."""
    verb, *words = call.overrides
    if verb == sweep.VERB:
        return sweep.load_submitted(words, config_dir=call.config_dir, config_name=call.config_name)
    if verb == "train":
        return load_config(call.verb, words, config_dir=call.config_dir, config_name=call.config_name)
    fix = f"For example, ray job submit --address http://head:8265 --working-dir . -- python -m raytune_llm {verb} ..."
    raise ConfigError("submit", "sends runs and, as submit tune, sweeps; Ray itself sends other commands", got=verb, fix=fix)


def with_option(argv: Sequence[str], option: str) -> list[str] | None:
    """The command's words with this option of a group (`model=x`) instead of all other words about the group. None for
    --config-name and --config-env, whose config has no groups."""
    if any(re.match(r"(--config-name|-cn|--config-env)(=|$)", word) for word in argv):
        return None
    group = option.partition("=")[0]
    return [*(word for word in argv if not re.match(rf"[+~]*{group}([.=@]|$)", word)), option]


def run_hydra(call: Call, verb_main: Callable[[Any], int]) -> int:
    """Run a command with Hydra's own flags (--cfg, --info, -m, tab completion). For a sweep, Hydra shows the base."""
    overrides = call.overrides
    if call.verb == sweep.VERB:
        if {"-m", "--multirun"} & set(call.hydra_flags):
            raise ConfigError("-m", "can't go with tune, which runs several values by itself", fix="Leave it out.")
        overrides, _ = sweep.split(call.overrides)
    return run_under_hydra(
        call.verb, overrides, call.hydra_flags, verb_main, config_dir=call.config_dir, config_name=call.config_name
    )
