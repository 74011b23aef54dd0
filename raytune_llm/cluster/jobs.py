"""Ray jobs on a cluster: submit, list, follow and stop them. [ray]"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import secrets
import signal
import ssl
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raytune_llm.cluster.package import write_zip
from raytune_llm.config.packed import pack
from raytune_llm.config.submit import check_address
from raytune_llm.errors import ConfigError, ResourceError, first_line

SILENT_S = 30.0
"""After this long without a line, the cluster is asked whether the job still runs."""
RETRY_S = (1.0, 2.0, 5.0, 10.0)
GIVE_UP_S = 600.0
"""Seconds without an answer after which following ends with an error; the job may keep running."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
NAME = "run"
OUTPUT = "output_dir"
STOPPED_EXIT_CODE = 130
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
SETTINGS = "RAYTUNE_LLM_RUN"
COMMAND = f"python -u -m raytune_llm train --config-env {SETTINGS} log_format=json"
"""The command of a job: train with the config of environment_of, and log events."""
RAYS_OWN = ("Running entrypoint for job ", "Runtime env is setting up.")
"""Lines that Ray itself writes at the start of a job's log."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The state of a job, as the cluster reports it."""

    id: str
    run: str
    """The run's name."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    """The exit code of the driver process. None: it has not ended."""
    started: float | None
    """Seconds since 1970; the same for `ended`."""
    ended: float | None
    output_dir: str | None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    @property
    def reason(self) -> str:
        """Why the job failed, in one line."""
        if self.status == "FAILED" and self.exit_code is not None:
            if self.exit_code == -signal.SIGKILL:
                return "its driver was killed (SIGKILL), as where memory runs out; submitted again, the run resumes"
            return f"its driver ended with exit code {self._code}"
        if self.message.startswith("runtime_env setup failed"):
            of_pip = re.findall(r"^ *ERROR: (.+)", self.message, re.MULTILINE)
            lines = of_pip or self.message.strip().splitlines()[-1:]
            return f"its packages, image or files could not be set up: {'; '.join(lines).strip(' .')}"
        return self.message.splitlines()[0] if self.message else "no reason was given"

    @property
    def outcome(self) -> int:
        """The exit code for a command that followed the job."""
        if self.status == "SUCCEEDED":
            return 0
        return self._code or (STOPPED_EXIT_CODE if self.status == "STOPPED" else 1)

    @property
    def _code(self) -> int | None:
        """As a shell has it: 128 and the signal of a driver that a signal ended."""
        return 128 - self.exit_code if self.exit_code is not None and self.exit_code < 0 else self.exit_code


class Jobs:
    """The jobs of the cluster whose dashboard is at `address`."""

    def __init__(self, address: str) -> None:
        """Raises ResourceError if nothing answers at the address, or if the cluster rejects the token."""
        self.address = address
        from raytune_llm.cluster.job_client import JobClient

        # Ray itself sends a token only where RAY_AUTH_MODE says so, which a run in this process may have set for its own cluster.
        token = own_token()
        headers = None if token is None else {"Authorization": f"Bearer {token}"}

        for module in ("dashboard_sdk", "job.sdk"):
            logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
        with self._explained(), _no_other_address():
            self._client = JobClient(address, headers=headers)

    def submit(
        self,
        name: str,
        command: str,
        *,
        files: Mapping[str, Path],
        requirements: Sequence[str] = (),
        image: str | None = None,
        env: Mapping[str, str] | None = None,
        output_dir: str,
    ) -> str:
        """Submit a job and return its id. files: path in the job's working folder -> local file; empty to use an image's own
        files."""
        environment: dict[str, Any] = {"env_vars": dict(env or {})}
        if requirements:
            environment["pip"] = {"packages": list(requirements), "pip_check": False}
        if image is not None:
            environment["image_uri"] = image
        job = _id_for(name)
        with tempfile.TemporaryDirectory(prefix="raytune-llm-") as folder:
            if files:
                package = Path(folder) / "package.zip"
                write_zip(files, package)
                environment["working_dir"] = str(package)
            try:
                with self._explained():
                    return self._client.submit_job(
                        entrypoint=command,
                        submission_id=job,
                        runtime_env=environment,
                        metadata={NAME: name, OUTPUT: output_dir},
                    )
            except KeyboardInterrupt as interrupt:
                interrupt.add_note(f"{job} may have been submitted by then. {come_back(job, self.address)}")
                raise

    def all(self) -> list[Job]:
        """All submitted jobs, newest first."""
        with self._explained():
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: -(job.started or time.time()))

    def find(self, name: str) -> Job:
        """The job with this id, or the newest one of the run with this name. Raises ConfigError if there is none."""
        jobs = self.all()
        for job in jobs:
            if name == job.id:
                return job
        for job in jobs:
            if name == job.run:
                return job
        there = ", ".join(job.id for job in jobs[:10]) or "none"
        raise ConfigError("job", f"must be a job of {self.address} or a run's name", got=name, fix=f"There are: {there}.")

    def get(self, job: str) -> Job:
        with self._explained():
            return _job(self._client.get_job_info(job))

    def log(self, job: str) -> str:
        with self._explained():
            return self._client.get_job_logs(job)

    def stop(self, job: str) -> None:
        with self._explained():
            self._client.stop_job(job)

    def lines(self, job: str, on_reconnect: Callable[[str], None]) -> Iterator[str]:
        """The lines of a job's log as they come, from its own first one until it has ended; on_reconnect: called with a
        message when the connection was lost."""
        with asyncio.Runner() as runner:  # an interrupt cancels what it waits for
            lines = self._lines(job, on_reconnect)

            async def coming() -> str | None:
                return await anext(lines, None)

            try:
                while (line := runner.run(coming())) is not None:
                    if not any(words in line for words in RAYS_OWN):
                        yield line
            finally:
                runner.run(_close(lines))

    async def _lines(self, job: str, on_reconnect: Callable[[str], None]) -> AsyncGenerator[str, None]:
        seen, rest, failures, lost = 0, "", 0, 0.0
        while True:
            skip = seen  # a new connection begins with the log's first line
            try:
                async for text in self._tail(job):
                    failures = 0
                    new, skip = text[skip:], max(0, skip - len(text))
                    seen += len(new)
                    *whole, rest = (rest + new).split("\n")
                    for line in whole:
                        yield line
                ended = self.get(job).has_ended
            except (ResourceError, *_broken()) as error:
                lost = lost if failures else time.monotonic()
                if time.monotonic() - lost > GIVE_UP_S:
                    raise ResourceError(f"{self.address} no longer answers ({error})", come_back(job, self.address)) from None
                if failures == 0:
                    on_reconnect(
                        f"the connection to {self.address} broke ({first_line(error)}): trying again for up to "
                        f"{GIVE_UP_S / 60:g} minutes; Ctrl-C leaves the job running"
                    )
                await asyncio.sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
                continue
            if ended:
                break
            await asyncio.sleep(RETRY_S[0])
        try:
            rest += self.log(job)[seen:]
        except ResourceError as error:  # it is on the node of the job's driver, which may be gone
            on_reconnect(f"the end of the log can't be read ({error.lacking})")
        for line in rest.splitlines():
            yield line

    async def _tail(self, job: str) -> AsyncGenerator[str, None]:
        """New text of the log. Ends when the connection ends, or when the job has ended and no more text arrives."""
        tail = self._client.tail_job_logs(job)
        coming: asyncio.Future[str] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(tail))
                if not (await asyncio.wait({coming}, timeout=SILENT_S))[0]:
                    if self.get(job).has_ended:
                        return
                    continue
                done, coming = coming, None
                try:
                    text = done.result()
                except StopAsyncIteration:
                    return
                yield text
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await tail.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # an async generator

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            what = f"rejects this machine's token ({first_line(error)})"
            if own_token() is None:
                what = "wants a token, and this machine has none"
            raise ResourceError(
                f"{self.address} {what}", "Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's."
            ) from None
        except (ConnectionError, OSError) as error:
            cause = _first_of(error)
            fix = "Start the head with --include-dashboard=true, or forward its port 8265 to this machine."
            if isinstance(cause, ssl.SSLError):
                fix = "Write http:// for a dashboard without TLS; SSL_CERT_FILE and REQUESTS_CA_BUNDLE name your own authority."
            what = getattr(cause, "strerror", None) or first_line(cause)
            raise ResourceError(f"no Ray dashboard answers at {self.address} ({what})", fix) from None
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise ConfigError("job", f"must be a job of {self.address}: {str(error).strip()}") from None
            raise ResourceError(f"{self.address} refused: {_said(error)}") from None


def _first_of(error: BaseException) -> BaseException:
    """Where the error comes from. Ray and requests wrap what the system said several times."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


async def _close(lines: AsyncGenerator[str, None]) -> None:
    """Also where a signal's handler has raised in the middle of the loop (SIGTERM), so that the next line is still awaited."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    await lines.aclose()


def address_of(setting: str | None) -> str:
    """The address in the setting or the environment. Raises ConfigError if there is none."""
    of_jobs, of_ray = (os.environ.get(name, "") for name in ADDRESSES)
    if not setting and of_jobs:
        check_address(ADDRESSES[0], of_jobs)
    address = setting or of_jobs or (of_ray if of_ray.startswith("http") else "")
    if not address:
        raise ConfigError(
            "submit.address",
            "must be given if RAY_API_SERVER_ADDRESS is not set",
            fix="For example, submit.address=http://head:8265.",
        )
    return address.rstrip("/")


def own_token() -> str | None:
    """This user's token, from where Ray looks for it. None: there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if not given and not path.is_file():
        return None
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"the token in {path} can't be read ({error})", "Set RAY_AUTH_TOKEN_PATH to another file.") from None


def open_to_all(address: str) -> str | None:
    """A warning if anyone who reaches the address can run code there, as far as this machine knows; else None."""
    host = urlsplit(address).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local or own_token() is not None:
        return None
    return (
        f"{address} is used without a token: whoever reaches it may run anything there. To switch tokens on, make one with "
        "`ray get-auth-token --generate`, start the head and its nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN=..., and set "
        "RAY_AUTH_TOKEN here."
    )


def environment_of(settings: str) -> dict[str, str]:
    """The environment variable that COMMAND reads the config from. The config is not in the package, which stays the same for all
    runs."""
    return {SETTINGS: pack(settings)}


def come_back(job: str, address: str) -> str:
    return f"Follow it with: python -m raytune_llm jobs logs {job} submit.address={address}"


def _id_for(name: str) -> str:
    """A new id for a job of the run, which a command line takes for no flag."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).lstrip('-.') or 'run'}-{secrets.token_hex(3)}"


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        run=_printable(metadata.get(NAME, details.submission_id)),
        status=str(getattr(details.status, "value", details.status)),
        message=_printable(details.message or ""),
        exit_code=details.driver_exit_code,
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if not details.end_time else details.end_time / 1000,
        output_dir=_printable(metadata[OUTPUT]) if OUTPUT in metadata else None,
    )


def _printable(text: str) -> str:
    """Jobs of others may have any text, which a terminal would take for commands."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def _said(error: RuntimeError) -> str:
    """What a dashboard answers; of a traceback the error itself."""
    text = str(error).strip().rstrip(".").rstrip()
    return text.splitlines()[-1] if "Traceback" in text else text


def _broken() -> tuple[type[Exception], ...]:
    """Exceptions of a broken connection."""
    import aiohttp

    return (RuntimeError, OSError, aiohttp.ClientError)


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Hides address variables, which Ray would prefer to the address that it is given."""
    before = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
