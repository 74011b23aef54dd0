from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raytune_llm import session
from raytune_llm.config.load import load_config
from raytune_llm.data import pipeline
from raytune_llm.data.pipeline import prepare
from raytune_llm.errors import DataError, RunLost

pytestmark = pytest.mark.ray


def write_rows(path, num_rows, bad=()):
    """About 4 MB, so several chunks."""
    with path.open("w") as stream:
        for number in range(num_rows):
            answer = None if number in bad else f"answer {number} " + "word " * (number % 200)
            messages = [{"role": "user", "content": f"request {number}"}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return path


def run_in(cache, path, resources):
    settings = ["model=tiny_random", f"data.path={path}", f"data.cache={cache}", f"resources={resources}", "data.max_length=2048"]
    return load_config("prepare", settings)


def prepared(run):
    return prepare(run.model, run.data, run.resources)


def test_ray_makes_the_shards_that_this_process_makes(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 6000, bad={10, 5000})
    inline, local = (prepared(run_in(tmp_path / name, path, name)) for name in ("inline", "local"))
    assert len(local.store.manifest["shards"]) > 2
    assert local.store.manifest == inline.store.manifest
    local.store.verify()
    for shard in inline.store.manifest["shards"]:
        ours, theirs = (result.store.folder / shard["name"] for result in (inline, local))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_mistake_in_the_data_comes_back_from_a_task_as_it_was_raised(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 6000)
    run = run_in(tmp_path / "cache", path, "local")
    data = dataclasses.replace(run.data, overlong="error", max_length=300)
    with pytest.raises(DataError, match=r"rows\.jsonl, row \d+: the row has \d+ tokens"):
        prepare(run.model, data, run.resources)


def test_rows_that_find_no_cpu_wait_and_say_so(tmp_path, caplog, monkeypatch):
    import ray

    monkeypatch.setattr(pipeline, "BUSY_SAID_AFTER_S", 0.2)
    run = run_in(tmp_path / "cache", write_rows(tmp_path / "rows.jsonl", 100), "local")
    session.connect(run.resources)
    total = ray.cluster_resources()["CPU"]
    holder = ray.remote(num_cpus=total)(Holder).remote()
    ray.get(holder.hold.remote())
    while ray.available_resources().get("CPU"):
        time.sleep(0.1)
    with ThreadPoolExecutor(1) as beside:
        preparing = beside.submit(prepared, run)
        while not caplog.messages and not preparing.done():
            time.sleep(0.1)
        ray.kill(holder)
        assert preparing.result().store.num_rows == 100
    assert f"waiting for 1 CPU to prepare rows; the cluster has 0 of {total:g} CPUs free" in caplog.messages


class Holder:
    def hold(self):
        pass


def test_tasks_that_never_end_end_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "NO_PROGRESS_S", 0.05)
    run = run_in(tmp_path / "cache", write_rows(tmp_path / "rows.jsonl", 6000), "local")
    with pytest.raises(RunLost, match=r"no task that prepares rows has ended for 0\.05 s.* resumes from the finished shards"):
        prepared(run)
