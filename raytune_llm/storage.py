"""A file system that is away for a while, such as a network file system whose server starts again, or that is full."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from raytune_llm.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)
AWAY = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
"""What NFS, Lustre and FUSE say while their server does not answer. A disk says EIO, too, and then says it each time."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, *[15.0] * 7)
"""Two minutes."""


def patiently(what: str, does: Callable[[], T]) -> T:
    """What `does` returns, which is called again while a file system is away; after two minutes its error is raised.

    what: fails, in the form "the checkpoint can't be written". All workers of a collective `does` call it equally often if it
    fails for all of them. A UserError has been explained already, and is raised at once.
    """
    for pause_s in PAUSES_S:
        try:
            return does()
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:  # torch derives its own from it
            if (reason := away_in(error)) is None:
                raise
            log.warning("%s (%s); trying again in %.0f s", what, reason, pause_s)
        time.sleep(pause_s)
    return does()


def patient(fails: str) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """Makes a function of a path one that is called `patiently`. fails: in the form "can't be read"."""

    def decorate(does: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        @wraps(does)
        def again(path: Path, *arguments: P.args, **settings: P.kwargs) -> T:
            return patiently(f"{path} {fails}", partial(does, path, *arguments, **settings))

        return again

    return decorate


def away_in(error: BaseException) -> str | None:
    """What a file system that is away said, anywhere in the error's chain; None: it is another error."""
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            return None
        if isinstance(cause, OSError) and cause.errno in AWAY:
            return cause.strerror or os.strerror(cause.errno or 0)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and all that led to it, on other workers too."""
    left, seen = [error], set[int]()
    while left:
        cause = left.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        failures = getattr(cause, "failures", None)
        if isinstance(failures, dict):
            left += [entry[0] for entry in failures.values()]
        left += [before for before in (cause.__cause__, cause.__context__) if before is not None]


NO_SPACE = ("No space left", "Disk quota exceeded", "File too large", "inline_container", " requested and ")
"""In errors of torch, of safetensors and of numpy (its `tofile`: 4096 requested and 512 written), which have no errno."""


def no_space_in(error: BaseException) -> str | None:
    """Whether a full disk (or a limit on file size or quota) caused the error, anywhere in its chain."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cause.strerror
        if any(words in str(cause) for words in NO_SPACE):
            return "no space left"
    return None
