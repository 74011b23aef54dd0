"""Recognizes file systems that don't answer for a while (a network file system whose server restarts), that are full, or that no
longer let a program write to a folder."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from raytune_llm.disk import DISK_FULL
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
"""Errors of NFS, Lustre and FUSE while their server does not answer. A broken disk also gives EIO, but on every retry."""
PAUSES_S = (1.0, 2.0, 4.0, 8.0, *[15.0] * 7)
"""Pauses between retries: two minutes in all."""


def patiently(what: str, does: Callable[[], T]) -> T:
    """Call `does` and return its result. While a file system does not answer, retry for two minutes, then raise its error.

    what: the failure in words, such as "the checkpoint can't be written". A collective `does` must fail on all workers or on
    none, so that all retry equally often. A UserError has already been explained, and is raised at once.
    """
    for pause_s in PAUSES_S:
        try:
            return does()
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:  # torch's CheckpointException is no Exception
            if (reason := away_in(error)) is None:
                raise
            log.warning("%s (%s); trying again in %.0f s", what, reason, pause_s)
        time.sleep(pause_s)
    return does()


def patient(fails: str) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """A decorator: call a function of a path `patiently`. fails: the failure in words, such as "can't be read"."""

    def decorate(does: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        @wraps(does)
        def again(path: Path, *arguments: P.args, **settings: P.kwargs) -> T:
            return patiently(f"{path} {fails}", partial(does, path, *arguments, **settings))

        return again

    return decorate


def away_in(error: BaseException) -> str | None:
    """The message if a file system that does not answer caused the error, anywhere in its chain; None for any other error."""
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            return None
        if isinstance(cause, OSError) and cause.errno in AWAY:
            return cause.strerror or os.strerror(cause.errno or 0)
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all errors that led to it, also those of other workers (`failures` of torch's CheckpointException)."""
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


def no_access_in(error: BaseException, folder: Path) -> str | None:
    """The message if the folder, or one in it, became read-only or was removed, anywhere in the error's chain; else None."""
    for cause in causes(error):
        if not isinstance(cause, OSError):
            continue
        if cause.errno == errno.EROFS and cause.filename is None:
            return cause.strerror
        if not isinstance(cause.filename, str) or not (path := Path(cause.filename)).is_relative_to(folder):
            continue
        if cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{path}: {cause.strerror}"
        if cause.errno == errno.ENOENT and not path.parent.exists():
            return f"{path.parent} was removed"
    return None


NO_SPACE = ("No space left", "Disk quota exceeded", "File too large", "inline_container", " requested and ")
"""Texts that mean a full disk, in errors without an errno: from torch, safetensors, and numpy's tofile ("4096 requested and 512
written")."""


def no_space_in(error: BaseException) -> str | None:
    """The message if a full disk, a quota or a limit on file size caused the error, anywhere in its chain; else None."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return cause.strerror
        if any(words in str(cause) for words in NO_SPACE):
            return "no space left"
    return None
