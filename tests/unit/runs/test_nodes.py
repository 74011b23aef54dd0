"""What is refused of a cluster's nodes, from what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llm.errors import ResourceError
from raytune_llm.runs.nodes import (
    PACKAGES,
    Node,
    Nodes,
    check_reachable,
    check_versions,
    workers_that_fit,
)
from raytune_llm.runs.shared_folders import remove_marker, sees, write_marker

ONE = Node(
    address="10.0.0.1",
    python="3.11.9",
    versions=dict.fromkeys(PACKAGES, "1.0"),
    gpus=8,
    shm_bytes=64 * 2**20,
    interface="eth0",
    interface_variables={},
    name_is_loopback=False,
)
TWO = replace(ONE, address="10.0.0.2", skew_s=-0.25)


def test_nodes_of_other_versions_are_refused_by_name():
    check_versions([ONE, TWO])
    other = replace(TWO, versions={**TWO.versions, "torch": "2.0"})
    with pytest.raises(ResourceError, match=r"have torch 1\.0 on 10\.0\.0\.1 and 2\.0 on 10\.0\.0\.2"):
        check_versions([ONE, other])
    with pytest.raises(ResourceError, match=r"python 3\.11\.9 on 10\.0\.0\.1 and 3\.12\.1"):
        check_versions([ONE, replace(TWO, python="3.12.1")])


def test_a_driver_on_a_node_of_its_own_is_compared_too_but_for_the_device_that_its_packages_are_built_for():
    gpu = replace(ONE, versions={**ONE.versions, "torch": "2.9.0+cu128"})
    driver = replace(TWO, versions={**ONE.versions, "torch": "2.9.0+cpu"})
    check_versions([gpu], driver)
    with pytest.raises(ResourceError, match=r"have ray 1\.0 on 10\.0\.0\.1 and 1\.1 on 10\.0\.0\.2 \(the driver\)"):
        check_versions([gpu], replace(driver, versions={**driver.versions, "ray": "1.1"}))
    assert Nodes(nodes=[gpu], backend="nccl", driver=driver).table()[-1].startswith("10.0.0.2 (driver)  3.11.9")


def test_a_name_that_leads_back_is_refused_unless_an_interface_is_named():
    lost = replace(TWO, name_is_loopback=True)
    with pytest.raises(ResourceError, match=r"host name of 10\.0\.0\.2 .* GLOO_SOCKET_IFNAME=eth0"):
        check_reachable(Nodes(nodes=[ONE, lost], backend="gloo"))
    check_reachable(Nodes(nodes=[ONE, replace(lost, interface_variables={"GLOO_SOCKET_IFNAME": "eth1"})], backend="gloo"))
    check_reachable(Nodes(nodes=[ONE, lost], backend="nccl"))
    check_reachable(Nodes(nodes=[lost, lost], backend="gloo"))  # one machine


def test_the_table_says_what_each_node_has_and_how_fast_they_are_together():
    nodes = Nodes(nodes=[ONE, TWO], backend="nccl", all_reduce_nodes=2, all_reduce_s={2**28: 0.01, 2**10: 1e-4})
    assert nodes.table()[2].split() == ["10.0.0.2", "3.11.9", "1.0", "1.0", "8", "64.0", "MiB", "-0.25", "s", "eth0"]
    assert nodes.rates() == [
        "all-reduce of 256 MiB by nccl: 10.00 ms, 25.00 GiB/s",
        "all-reduce of 1 KiB by nccl: 0.10 ms, 0.01 GiB/s",
    ]


def test_workers_take_part_where_there_is_room_for_one():
    assert workers_that_fit({"CPU": 4.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}) == 2
    assert workers_that_fit({"CPU": 4.0}, {"CPU": 1.0, "GPU": 0.5}) == 0
    assert workers_that_fit({"CPU": 0.6}, {"CPU": 0.2, "GPU": 0.0}) == 3


def test_a_marker_leaves_nothing_behind(tmp_path: Path):
    folder = tmp_path / "new"
    assert write_marker(folder, "mark") == "" and sees(folder / "mark")
    remove_marker(folder, "mark")
    assert not folder.exists()
    (tmp_path / "file").touch()
    assert write_marker(tmp_path / "file", "mark")
