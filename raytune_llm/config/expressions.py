"""The rule for settings whose keys are regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from raytune_llm.errors import ConfigError


def check_expressions(setting: str, patterns: Iterable[str]) -> None:
    """Raises ConfigError for a key that is not a valid regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            rule = f"must have regular expressions as its keys: this one is invalid ({error})"
            fix = "Write a backslash before brackets that are meant as such."
            raise ConfigError(setting, rule, got=pattern, fix=fix) from None
