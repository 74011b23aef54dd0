"""A run on two machines that share an object store alone: two nodes with caches of their own, and S3 as moto plays it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_llm import api, load_config, session
from raytune_llm.object_store import RemoteFolder
from raytune_llm.report.updates import EndOfRun
from tests.group import metrics
from tests.ray.head import head_without_cpus, kill, node, wait_for_cpus
from tests.runs import tiny_run
from tests.s3 import s3_bucket

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_bucket("outputs") as address:
        yield address


def test_workers_with_disks_of_their_own_save_and_resume_through_the_store(
    bucket: str, chat_rows: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "driver"))
    plain = tiny_run(chat_rows, cache, tmp_path / "plain", "train.max_steps=20", "train.epochs=9", "checkpoint.every_steps=2")
    with head_without_cpus() as address:
        words = ["data.path=x", "resources=cluster", f"resources.address={address}", "resources.num_workers=2"]
        resources = load_config("train", [*words, "resources.preflight=off"]).resources
        data = replace(plain.data, cache=f"{bucket}/run/tokens")
        run = replace(plain, output_dir=f"{bucket}/run", resources=resources, data=data)

        def end_at_5(record: Mapping[str, Any]) -> None:
            if record["step"] >= 5:
                raise EndOfRun

        nodes = []
        try:
            session.connect(resources)
            for name in ("one", "other"):
                nodes.append(node(address, XDG_CACHE_HOME=str(tmp_path / name)))
                wait_for_cpus(len(nodes))
            with pytest.raises(EndOfRun):
                api.train(run, sinks=[end_at_5])
            result = api.train(run)
        finally:
            for one in nodes:
                kill(one)
    assert result.resumed_from is not None and result.resumed_from >= 4 and result.summary.world_size == 2
    states = [sorted(path.name for path in tmp_path.glob(f"{name}/**/step-20/state/*")) for name in ("one", "other")]
    assert sorted(states) == [[".metadata", "__0_0.distcp"], ["__1_0.distcp"]], "each machine wrote its own part"
    for name in ("driver", "one", "other"):
        assert len(list(tmp_path.glob(f"{name}/raytune_llm/tokens/*/*/manifest.json"))) == 1, "a copy of the tokens each"
    there = RemoteFolder(run.output_dir).files()
    assert {"checkpoints/step-20/COMPLETE", "checkpoints/step-20/state/__1_0.distcp", "finished.json"} <= there.keys()
    assert not any(name.startswith(".ray") for name in there)
    assert (result.final / "adapter_model.safetensors").is_file() and result.final.is_relative_to(tmp_path / "driver")

    api.train(plain)
    for mine, theirs in zip(metrics(str(result.output_dir)), metrics(plain.output_dir), strict=True):
        assert mine["step"] == theirs["step"]
        for name in {"loss", "eval_loss"} & theirs.keys():
            assert math.isclose(mine[name], theirs[name], rel_tol=2e-4, abs_tol=1e-5), (mine["step"], name)
