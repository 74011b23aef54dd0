"""Two Ray nodes in network namespaces of this machine: what is told and refused of them before a run."""

from __future__ import annotations

import json
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
from raytune_llm import UserError, api, load_config, session

{connect}
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


AT_ITS_NODE = f'ray.init(address="{FIRST}:{PORT}", _node_ip_address="{FIRST}", log_to_driver=False)'
AT_THE_HEAD_THAT_IT_SEES = f'ray.init(address="{FIRST}:{PORT}", log_to_driver=False)'


def told(nodes: tuple[str, Path], folder: str, workers: str, *, connect: str = AT_ITS_NODE, second: bool = False) -> str:
    """second: the driver is on the other node than the head."""
    head, place = nodes
    driver = DRIVER.format(connect=connect)
    variables = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    name = f"{head[:-1]}b" if second else head
    command = ["ip", "netns", "exec", name, sys.executable, "-c", driver, f"{place}/{folder}", workers]
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


@pytest.mark.long
def test_a_driver_that_nodes_can_not_reach_is_refused(nodes):
    said = told(nodes, "shared", workers="1", connect=AT_THE_HEAD_THAT_IT_SEES, second=True)
    assert f"can't fetch what this process holds, at {FIRST}. Open all ports between that address and the nodes" in said


@pytest.mark.parametrize("cache", ["tokens", "own"])
def test_a_driver_on_another_node_than_the_head_joins_its_own_node_and_prepares_rows_on_both(nodes, cache):
    head, place = nodes
    rows = place / "rows.jsonl"
    turns = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "many"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 2000)
    words = ["model=tiny_random", f"data.path={rows}", f"data.cache={place}/{cache}", "resources=cluster"]
    variables = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    inside = ["ip", "netns", "exec", f"{head[:-1]}b", sys.executable, "-m", "raytune_llm", "prepare"]
    command = [*inside, *words, f"resources.address={FIRST}:{PORT}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200)
    if cache == "own":
        assert (
            done.returncode == 2 and f"error: data.cache must be on storage that all nodes share: {SECOND} can't" in done.stderr
        )
    else:
        assert done.returncode == 0 and "rows/s" in done.stdout, done.stderr


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
