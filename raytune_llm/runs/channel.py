"""The driver's end of the messages from workers: it starts the inbox, polls it, and calls the run's callbacks. [ray]"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from raytune_llm.errors import ResourceError, RunLost, UserError
from raytune_llm.report.metrics import Sink
from raytune_llm.report.slow import notify_if_slow
from raytune_llm.report.updates import Notice, ReferencePass, RunStarted, SampledAnswer, Update
from raytune_llm.runs.faults import (
    WORKERS_LOG,
    Stalls,
    WorkersLost,
    WorkersNotStarted,
    WorkerStalled,
    WorkersWait,
    lost_line,
    not_started_line,
    silent_line,
    stalled_line,
)
from raytune_llm.runs.inbox import Inbox, Message
from raytune_llm.runs.outcome import TrainOutcome
from raytune_llm.runs.ray_failures import ray_lost

POLL_S = 0.2
PATIENCE_S = 30.0
"""How long an inbox may not answer before the run counts as lost."""
ABORT_S = 3.0
"""Longest wait for the callback of a run that is interrupted."""


class Channel:
    """Polls the inbox in a thread, from construction until `close` or `abort`."""

    def __init__(
        self,
        output: Path,
        *,
        saved_steps: Callable[[], Sequence[int]],
        stall_timeout_s: float,
        sinks: Sequence[Sink],
        on_update: Callable[[Update], None],
        on_samples: Callable[[Sequence[SampledAnswer]], None],
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # On the driver's node, so that it survives the loss of any other node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.inbox: Any = ray.remote(num_cpus=0)(Inbox).options(scheduling_strategy=here).remote()
        self.error: UserError | None = None
        """The first error of a worker that the user has to fix."""
        self.outcome: TrainOutcome | None = None
        self.callback_error: Exception | None = None
        """The error that a callback raised. No callback is called after it, but training continues."""
        self.lost: RunLost | None = None
        """The error if the inbox is gone. It is on the driver's node, so Ray itself has died."""
        self.has_started = False
        """The group has reached its first step."""
        self.last_loss = ""
        """The last notice about lost workers."""
        self._sinks, self._on_update, self._on_samples = sinks, on_update, on_samples
        self._saved_steps = saved_steps
        self._output, self._stall_timeout_s = output, stall_timeout_s
        self._silent: set[int] = set()
        """Ranks whose missing heartbeats were reported."""
        self._stalls = Stalls(stall_timeout_s)
        self._starting = ExitStack()
        self._notify_if_start_is_slow()
        self._answered = time.monotonic()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read the remaining messages, and end the inbox."""
        self._closing.set()
        self._thread.join()
        if self.lost is None:
            self._try_to_take(patience_s=0.0)
        self._give_up_start()
        self._end_inbox()

    def abort(self) -> None:
        """End the inbox at once. Its unread messages are lost."""
        self._closing.set()
        self._thread.join(ABORT_S)
        self._give_up_start()
        self._end_inbox()

    def _end_inbox(self) -> None:
        import ray

        if self.lost is None:  # otherwise this would wait for a head that is gone
            with suppress(Exception):
                ray.kill(self.inbox)

    def _run(self) -> None:
        while self.lost is None and not self._closing.wait(POLL_S):
            self._try_to_take(PATIENCE_S)

    def _try_to_take(self, patience_s: float) -> None:
        from ray.exceptions import ActorDiedError, RayError

        try:
            self._take()
            self._answered = time.monotonic()
        except RayError as error:
            if isinstance(error, ActorDiedError) or time.monotonic() - self._answered > patience_s:
                self.lost = ray_lost(error)

    def _take(self) -> None:
        import ray

        contents: Any = ray.get(self.inbox.take.remote(), timeout=PATIENCE_S)
        self.error, self.outcome = contents.error, contents.outcome
        try:
            for message in contents.messages if self.callback_error is None else ():
                self._deliver(message, contents.hosts)
            if stalled := self._stalls.take():
                line = stalled_line(stalled, contents.hosts, self._output / WORKERS_LOG)
                self._on_update(Notice(text=line, ranks=tuple(sorted(one.rank for one in stalled))))
            self._report_silent(contents.silent_s, contents.hosts)
        except Exception as error:
            self.callback_error = error  # raised in the main thread, once the workers have finished

    def _deliver(self, message: Message, hosts: Mapping[int, str]) -> None:
        match message:
            case RunStarted() | ReferencePass() | Notice():
                self._starting.close()
                self.has_started = self.has_started or isinstance(message, RunStarted)
                self._on_update(message)
            case WorkersLost():
                self._report_lost(message, hosts)
            case WorkersNotStarted():
                self._report_not_started(message)
            case WorkersWait():
                self._give_up_start()
                if message.line is None:
                    self._notify_if_start_is_slow()
                else:
                    self._on_update(Notice(text=message.line))
            case WorkerStalled():
                self._log(f"worker {message.rank}, {message.seconds:.0f} s after step {message.step}:\n{message.stack}")
                self._stalls.add(message)
            case Mapping():
                for sink in self._sinks:
                    sink(message)
            case _:
                self._on_samples(message)

    def _notify_if_start_is_slow(self) -> None:
        self._starting.enter_context(notify_if_slow(self._on_update, "starting the workers"))

    def _give_up_start(self) -> None:
        """End the notice about starting workers as failed, if they are still starting, so that nothing reports them as
        started."""
        failure = InterruptedError()
        self._starting.__exit__(type(failure), failure, None)

    def _report_lost(self, lost: WorkersLost, hosts: Mapping[int, str]) -> None:
        self._log(lost.details)
        log = self._output / WORKERS_LOG
        self.last_loss = lost_line(lost, hosts, resumes_from=self._resumes_from(), log=log)
        self._give_up_start()
        if lost.again:
            self._on_update(Notice(text=self.last_loss, ranks=tuple(sorted(lost.how))))
            self._notify_if_start_is_slow()

    def _report_not_started(self, failed: WorkersNotStarted) -> None:
        self._log(failed.details)
        self._give_up_start()
        if failed.again:  # otherwise it is the run's error
            self._on_update(Notice(text=not_started_line(failed, self._output / WORKERS_LOG)))
            self._notify_if_start_is_slow()

    def _resumes_from(self) -> str:
        try:
            step = max(self._saved_steps(), default=None)
        except (OSError, ResourceError):  # the storage may be what went away
            return "the newest checkpoint"
        return "the beginning" if step is None else f"step {step}"

    def _report_silent(self, silent_s: Mapping[int, float], hosts: Mapping[int, str]) -> None:
        silent = {rank for rank, seconds in silent_s.items() if seconds > self._stall_timeout_s}
        for rank in silent - self._silent:
            self._on_update(Notice(text=silent_line(rank, silent_s[rank], hosts), ranks=(rank,)))
        self._silent = silent

    def _log(self, text: str) -> None:
        with (self._output / WORKERS_LOG).open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n\n")
