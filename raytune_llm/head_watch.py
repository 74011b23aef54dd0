"""Ends a command whose cluster has lost its head. [ray]

Ray waits for a head for a minute, and then aborts the process with a message of its own. It does so in the middle of any call,
also while the process cleans up. So the command ends before: like after Ctrl-C, but with the error and its exit code.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from raytune_llm.errors import HeadLost, ResourceError

log = logging.getLogger(__name__)
LOOK_EVERY_S, CONNECTS_WITHIN_S = 1.0, 5.0
SAID_AFTER_S = 5.0
PATIENCE_S = 25.0
"""How long a head may not answer: it may be started again. Where Ray itself waits longer than usual, so does the watch."""
RAYS_PATIENCE, RAYS_PATIENCE_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
"""After this time, Ray aborts the process."""
ENDS_WITHIN_S = 20.0
"""How long the main thread may take to end. A call of Ray that waits for the head doesn't notice signals."""
SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def ends_without_head(then: str) -> Iterator[None]:
    """Raises HeadLost in this block, or in a function that it decorates, if the head of the connected cluster does not answer for
    PATIENCE_S. then: what the same command does, such as "resumes from the newest checkpoint".

    Only in the main thread, which alone can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = HeadWatch(then)
    try:
        yield
    except KeyboardInterrupt:
        if watch.lost is not None:
            raise watch.lost from None
        raise
    except Exception as error:
        if (lost := watch.explains(error)) is not None:
            raise lost from None
        raise
    finally:
        watch.close()


class HeadWatch:
    """Looks for the head from another thread, until `close`."""

    def __init__(self, then: str) -> None:
        self.lost: HeadLost | None = None
        self._then = then
        self._patience_s = PATIENCE_S + max(0.0, float(os.environ.get(RAYS_PATIENCE, RAYS_PATIENCE_S)) - RAYS_PATIENCE_S)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="head", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def explains(self, error: Exception) -> HeadLost | None:
        """The error to raise for this one; None: it has another reason."""
        from_ray = type(error).__module__.startswith("ray.")
        address = connected_head() if from_ray or isinstance(error, ResourceError) else None
        return self.lost or (None if address is None or answers(address) else self._lost(address))

    def _run(self) -> None:
        answered = time.monotonic()
        said = False
        hushed = None
        while not self._closed.wait(LOOK_EVERY_S):
            address = connected_head()
            if address is None or answers(address):
                answered, said = time.monotonic(), False
                hushed = hushed and hushed()
                continue
            hushed = hushed or hush()
            silent_s = time.monotonic() - answered
            if silent_s > self._patience_s:
                self._end(self._lost(address))
                return
            if silent_s > SAID_AFTER_S and not said:
                said = True
                log.warning(
                    "waiting for the head of the cluster, which does not answer at %s, for up to %g s", address, self._patience_s
                )

    def _lost(self, address: str) -> HeadLost:
        return HeadLost(
            f"Ray lost the run: its head does not answer at {address}", f"The same command {self._then}, once Ray is back."
        )

    def _end(self, lost: HeadLost) -> None:
        self.lost = lost
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._closed.wait(ENDS_WITHIN_S):
            print(f"{SHOW_CURSOR if sys.stderr.isatty() else ''}\nerror: {lost}", file=sys.stderr, flush=True)
            os._exit(lost.exit_code)


def hush() -> Callable[[], None]:
    """Standard error gets Python's lines alone, until the returned function is called. While it waits for a head, Ray's native
    code writes a line there for each retry, beside its log file."""
    python = sys.stderr
    try:
        if python.fileno() != 2:
            return lambda: None
    except (OSError, ValueError):  # a notebook's, or one that is closed
        return lambda: None
    python.flush()
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding=python.encoding, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)

    def back() -> None:
        sys.stderr.flush()
        os.dup2(kept, 2)
        sys.stderr = python

    return back


def connected_head() -> str | None:
    """The address of the head of the cluster that this process is connected to. None: it is not connected."""
    if "ray" not in sys.modules:
        return None
    import ray

    try:
        return ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    except Exception:  # the connection is being closed
        return None


def answers(address: str) -> bool:
    """Whether something listens there. A head that is frozen does, for which Ray waits, too."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECTS_WITHIN_S).close()
    except OSError:
        return False
    return True
