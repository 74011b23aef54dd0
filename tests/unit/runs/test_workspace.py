"""What runs of one process leave for the next one changes nothing but their time."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from raytune_llm import api, load_config
from raytune_llm.models.shared import SharedModel
from raytune_llm.report.metrics import read_metrics
from raytune_llm.runs.workspace import Workspace
from tests.models import tiny_llama


def run_of(rows, cache, folder, *more):
    words = [
        "model=tiny_random", "resources=inline", "tracking=none", "train.precision=fp32", "train.log_every_steps=1",
        "train.global_batch_size=4", "train.max_steps=2", "train.eval_every_steps=1", "data.max_length=64",
        "data.eval_fraction=0.1",
        f"data.path={rows}", f"data.cache={cache}", f"output_dir={folder}", *more,
    ]  # fmt: skip
    return load_config("train", words)


def losses(folder):
    return [(record["step"], record.get("loss"), record.get("eval_loss")) for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["adapter.rank=2", "optimizer.lr=1e-1"], ["adapter=dora", "adapter.rank=4"]),
        (["adapter=none", "optimizer.lr=1e-1"], ["adapter.rank=2"]),
        (["adapter.rank=2"], ["adapter=none"]),
    ],
)
def test_a_run_after_another_one_is_the_run_alone(chat_rows, cache, tmp_path, first, then):
    workspace = Workspace(keeps_base=True)
    api.train(run_of(chat_rows, cache, tmp_path / "first", *first), workspace=workspace)
    api.train(run_of(chat_rows, cache, tmp_path / "second", *then), workspace=workspace)
    api.train(run_of(chat_rows, cache, tmp_path / "alone", *then))
    assert losses(tmp_path / "second") == losses(tmp_path / "alone")
    (file,) = {path.name for path in (tmp_path / "alone" / "final").glob("*.safetensors")}
    second, alone = (load_file(tmp_path / name / "final" / file) for name in ("second", "alone"))
    assert second.keys() == alone.keys() and all(torch.equal(second[name], alone[name]) for name in alone)


def test_a_base_is_loaded_once_and_another_takes_its_place():
    shared, loads = SharedModel(), []

    def load():
        loads.append(1)
        return tiny_llama().base

    first, second = shared.copy_of("a", load), shared.copy_of("a", load)
    assert len(loads) == 1 and first is not second
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(one is not two and one.data_ptr() == two.data_ptr() for one, two in pairs)
    assert first.get_input_embeddings().weight is not second.get_input_embeddings().weight
    shared.copy_of("b", load)
    assert len(loads) == 2


@pytest.mark.long
def test_memory_is_flat_over_many_runs(chat_rows, cache, tmp_path):
    workspace = Workspace(keeps_base=True)
    base = run_of(chat_rows, cache, tmp_path, "train.max_steps=1", "checkpoint.every_steps=null", "train.exact_match_rows=1")
    held = []
    gc.freeze()  # what other tests left is not looked at
    for number in range(25):
        optimizer = replace(base.optimizer, lr=1e-4 * (number + 1))
        api.train(replace(base, output_dir=str(tmp_path / str(number)), optimizer=optimizer), workspace=workspace)
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        held.append((len(tensors), sum({thing.data_ptr(): thing.nbytes for thing in tensors}.values()), resident_bytes()))
    gc.unfreeze()
    counts, tensor_bytes, resident = zip(*held[9:], strict=True)
    assert counts[-1] <= counts[0] and tensor_bytes[-1] <= tensor_bytes[0]
    assert resident[-1] - resident[0] < 12 * 2**20


def resident_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
