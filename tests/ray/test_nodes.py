"""Two Ray nodes in network namespaces of this machine: what is told and refused of them before a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip`"),
]
ROOT = Path(__file__).parent.parent.parent
FIRST, SECOND = "10.231.9.1", "10.231.9.2"
LINK, PORT = "vrt0", 6399
DRIVER = """
import sys
import ray
from raytune_llm import UserError, api, load_config

ray.init(address="{first}:{port}", _node_ip_address="{first}", log_to_driver=False)
words = ["data.path=x", "model=tiny_random", "resources=cluster", "output_dir=" + sys.argv[1], "data.cache=" + sys.argv[1]]
run = load_config("train", [*words, "resources.num_workers=" + sys.argv[2]])
try:
    api._check_nodes(run, run.resources, lambda notice: print(notice.text))
except UserError as error:
    print("refused:", error)
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[str, Path]]:
    with two_nodes(cpus_of_head=1) as found:
        yield found


@contextmanager
def two_nodes(*, cpus_of_head: int) -> Iterator[tuple[str, Path]]:
    """The namespace of the head, and a folder whose `own` is another one on each node."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    names = [f"raytune-{os.getpid()}-{cpus_of_head}{end}" for end in "ab"]
    started: list[subprocess.Popen[bytes]] = []
    (folder / "own").mkdir()
    try:
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                run("ip", "-n", name, "link", "set", device, "up")
            place = f"--head --port={PORT} --include-dashboard=false" if address == FIRST else f"--address={FIRST}:{PORT}"
            ray = f"{Path(sys.executable).with_name('ray')} start --block {place} --node-ip-address={address}"
            ray += f" --num-cpus={cpus_of_head if address == FIRST else 1}"
            # `ip netns exec` has mounts of its own, so that a node can lack what the other has.
            own = "true" if address == FIRST else f"mount -t tmpfs none {folder}/own"
            command = f"{own} && exec {ray} --temp-dir={folder}/ray --disable-usage-stats"
            variables = {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": LINK, "PYTHONPATH": str(ROOT)}
            with (folder / "started.txt").open("a") as said:
                inside = ["ip", "netns", "exec", name, "sh", "-c", command]
                started.append(subprocess.Popen(inside, stdout=said, stderr=said, env={**os.environ, **variables}))
            until = time.monotonic() + 90
            while (folder / "started.txt").read_text().count("Ray runtime started") < len(started):
                assert time.monotonic() < until and started[-1].poll() is None, (folder / "started.txt").read_text()
                time.sleep(0.3)
        yield names[0], folder
    finally:
        processes = [child for one in started for child in psutil.Process(one.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        for one in started:
            one.kill()
            one.wait()
        psutil.wait_procs(processes, timeout=10)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def told(nodes: tuple[str, Path], folder: str, workers: str) -> str:
    head, place = nodes
    driver = DRIVER.format(first=FIRST, port=PORT)
    variables = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = ["ip", "netns", "exec", head, sys.executable, "-c", driver, f"{place}/{folder}", workers]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nodes_that_can_work_together_are_told_with_their_all_reduce(nodes):
    said = told(nodes, "shared", workers="2")
    assert "refused" not in said
    for address in (FIRST, SECOND):
        assert any(line.startswith(address) and f"{LINK} (GLOO_SOCKET_IFNAME)" in line for line in said.splitlines()), said
    assert "all-reduce of 16 MiB by gloo" in said
    assert not (nodes[1] / "shared").exists()


def test_a_folder_that_a_node_does_not_see_is_refused(nodes):
    said = told(nodes, "own", workers="1")
    assert f"refused: output_dir must be on storage that all nodes share: {SECOND} can't see what {FIRST} writes there" in said
    assert "all-reduce" not in said


def test_a_run_that_may_grow_over_nodes_measures_their_all_reduce(nodes):
    assert "all-reduce of 16 MiB by gloo" in told(nodes, "shared", workers="[1,2]")


def test_a_driver_on_a_head_that_takes_no_work_is_a_machine_of_its_own():
    with two_nodes(cpus_of_head=0) as nodes:
        said = told(nodes, "shared", workers="1")
        assert "refused" not in said and f"{FIRST} (driver)" in said and "all-reduce" not in said
        said = told(nodes, "own", workers="1")
    assert f"storage that all nodes share: the driver can't see what {SECOND} writes there" in said
