"""A Ray head of a test's own: with a dashboard, on ports of its own, ended with all that it started."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

BINARIES = Path(sys.executable).parent
SAID = "start.txt"
STARTS = 3
"""A port that was free may be another process's when the head opens it; the head ends then."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def ray_head(*, cpus: int = 2, **environment: str) -> Iterator[str]:
    """The address of its dashboard."""
    url = ""

    def options() -> list[str]:
        nonlocal url
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        return [
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
            f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
            f"--metrics-export-port={free_port()}",
        ]  # fmt: skip

    with _head(options, lambda folder: _answers(f"{url}/api/version"), cpus, environment):
        yield url


@contextmanager
def head_to_kill() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a head of one CPU without a dashboard, and its process."""
    address = "ray_current_cluster"  # Ray's file

    with _head(lambda: ["--include-dashboard=false"], lambda folder: (folder / address).exists(), 1, {}) as (folder, head):
        yield (folder / address).read_text().strip(), head


@contextmanager
def _head(
    options: Callable[[], Sequence[str]], is_up: Callable[[Path], bool], cpus: int, environment: Mapping[str, str]
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Its folder and its process. is_up: called with the folder. It is started again on other ports if it could not open one."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables |= {"PATH": f"{BINARIES}:{variables['PATH']}", "RAY_AUTH_MODE": "disabled", **environment}
    folders: list[Path] = []
    heads: list[subprocess.Popen[bytes]] = []
    try:
        while True:
            folders.append(Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp")))  # short: sockets lie in it
            heads.append(_start(folders[-1], cpus, options(), variables))
            if _comes_up(lambda: is_up(folders[-1]), heads[-1]):
                break
            _end(heads[-1])
            assert len(heads) < STARTS, (folders[-1] / SAID).read_text()
        yield folders[-1], heads[-1]
    finally:
        _end(heads[-1])
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, cpus: int, options: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [
        f"{BINARIES}/ray", "start", "--head", "--block", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--port=0",
        f"--num-cpus={cpus}", f"--ray-client-server-port={free_port()}", "--disable-usage-stats", *options,
    ]  # fmt: skip
    with (folder / SAID).open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=variables, cwd=folder)


def _comes_up(is_up: Callable[[], bool], head: subprocess.Popen[bytes]) -> bool:
    until = time.monotonic() + 120
    while time.monotonic() < until and head.poll() is None:
        if is_up():
            return True
        time.sleep(0.3)
    return False


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


def _end(head: subprocess.Popen[bytes]) -> None:
    if head.poll() is not None:
        return
    processes = [psutil.Process(head.pid)]
    processes += processes[0].children(recursive=True)
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


@contextmanager
def head_without_cpus() -> Iterator[str]:
    """The address of a cluster that `node` joins."""
    with _cluster([]) as address:
        yield address


@contextmanager
def head_of_nodes(nodes: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """A cluster of nodes with these resources (num_cpus, num_gpus), to which this process is connected."""
    import ray

    with _cluster(nodes) as address:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        yield


@contextmanager
def _cluster(nodes: Sequence[Mapping[str, float]]) -> Iterator[str]:
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for one in nodes:
            cluster.add_node(**one)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def node(address: str, **environment: str) -> subprocess.Popen[bytes]:
    """A node with one CPU, in processes of its own."""
    ray = str(Path(sys.executable).with_name("ray"))
    words = [ray, "start", f"--address={address}", "--num-cpus=1", "--block", "--disable-usage-stats"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, stdout=quiet, stderr=quiet, env={**os.environ, **environment})


def wait_for_cpus(count: int) -> None:
    """Of the cluster that this process is connected to."""
    import ray

    until = time.monotonic() + 90
    while ray.cluster_resources().get("CPU", 0) < count:
        assert time.monotonic() < until, ray.nodes()
        time.sleep(0.3)


def kill(node: subprocess.Popen[bytes]) -> None:
    """As a machine goes: all at once."""
    if node.poll() is None:
        for process in psutil.Process(node.pid).children(recursive=True):
            process.kill()
        node.kill()
        node.wait()
