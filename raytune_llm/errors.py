"""Errors that a user can fix. Everything else that goes wrong is a bug, and keeps its traceback."""

from __future__ import annotations

from yaml import YAMLError

NOT_YAML = (YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises for text that it can't parse. A value that doesn't match its tag raises a bare KeyError or
AttributeError."""


MAX_SHOWN_CHARS = 600
"""An error shortens a value that is longer."""


class UserError(Exception):
    """Something that the user can fix. The command prints it without a traceback and exits with code 2."""

    exit_code = 2
    instead = ""
    """An override with which the same command works; it replaces the overrides of its group. Empty if there is none."""


class ConfigError(UserError):
    """A setting breaks a rule: `train.max_steps must be at least 1, got 0. Raise it.`"""

    def __init__(self, setting: str, rule: str, *, got: object = None, fix: str = "", instead: str = "") -> None:
        super().__init__(setting, rule, got, fix, instead)
        self.setting, self.rule, self.got, self.fix, self.instead = setting, rule, got, fix, instead

    def __reduce__(self):
        return _config_error, (self.setting, self.rule, self.got, self.fix, self.instead)

    def __str__(self) -> str:
        got = "" if self.got is None else f", got {_short(repr(self.got) if isinstance(self.got, str) else str(self.got))}"
        return f"{_short(self.setting)} {self.rule}{got}. {self.fix}".rstrip()


def _short(value: str) -> str:
    """The value, or the two ends of a long one."""
    half = MAX_SHOWN_CHARS // 2
    return value if len(value) <= MAX_SHOWN_CHARS else f"{value[:half]} ... {value[-half:]} ({len(value):,} characters)"


def _config_error(setting: str, rule: str, got: object, fix: str, instead: str) -> ConfigError:
    return ConfigError(setting, rule, got=got, fix=fix, instead=instead)


class DataError(UserError):
    """Data that can't be used. where: the file, and the row counted from 1. problem: what is wrong with it."""

    def __init__(self, where: str, problem: str, fix: str = "") -> None:
        super().__init__(where, problem, fix)
        self.where, self.problem, self.fix = where, problem, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.fix}".rstrip()


class ResourceError(UserError):
    """The machine or the cluster lacks something: disk, memory, workers, a package."""

    def __init__(self, lacking: str, fix: str = "") -> None:
        super().__init__(lacking, fix)
        self.lacking, self.fix = lacking, fix

    def __str__(self) -> str:
        return f"{self.lacking}. {self.fix}".rstrip()


class RunLost(ResourceError):
    """A run lost its workers, its nodes, Ray or its storage. The user made no mistake, so the exit code is 1, and the same
    command resumes the run."""

    exit_code = 1


class HeadLost(RunLost):
    """The head of the Ray cluster is gone. Ray aborts this process soon, also while it exits, so it must end at once."""


class Diverged(UserError):
    """The loss or the gradients became NaN or infinite. The same command would fail again; settings or data must change."""

    def __init__(self, how: str, fix: str) -> None:
        super().__init__(how, fix)
        self.how, self.fix = how, fix

    def __str__(self) -> str:
        return f"{self.how}. {self.fix}"


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def last_line(error: BaseException) -> str:
    """The last line of the error's message, which in a traceback is the error itself, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
