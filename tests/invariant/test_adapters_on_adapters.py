"""An adapter on merged ones (model.merged_adapters) resumes exactly, loads in plain PEFT on the merged base, and exports merged.

The first one merged has modules that are whole (modules_to_save), which replace the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from raytune_llm import api, load_config
from raytune_llm.config.run import TrainRun
from tests.invariant.test_adapter_kinds import SAVED_AS
from tests.invariant.test_adapter_kinds import SETTINGS as KINDS
from tests.invariant.test_same_run_everywhere import assert_same_run
from tests.invariant.test_saved_models_load_elsewhere import in_memory_logits
from tests.models import saved_llama
from tests.runs import PowerCut, cut_at, tiny_run

IDS = torch.arange(5, 60)
WHOLE = ["adapter=lora", "adapter.modules_to_save=[norm,lm_head]"]
LIKE_OTHERS = {"rslora", "lora_plus", "pissa"}
SETTINGS = {"lora": ["adapter=lora"], "whole modules": WHOLE, **{kind: KINDS[kind] for kind in KINDS if kind not in LIKE_OTHERS}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "base", max_position_embeddings=256)


@pytest.fixture(scope="module")
def first(base: Path, chat_rows: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_on(base, (), [chat_rows, cache], tmp_path_factory.mktemp("first") / "run", *WHOLE, "train.max_steps=2")
    return api.train(run).final


def run_on(base: Path, merged: Sequence[Path], data: Sequence[str], folder: Path, *settings: str) -> TrainRun:
    under = f"model.merged_adapters=[{','.join(repr(str(one)) for one in merged)}]"
    words = ["model=hub", f"model.path={base}", "model.tokenizer=bytes", under, "optimizer.lr=5e-3"]
    return tiny_run(*data, folder, *words, *settings)


def exported(folder: Path, *settings: str) -> Any:
    """As transformers loads it. The export's own check compares it with the adapters in memory."""
    words = [*settings, f"export.output_dir={folder}", "resources=inline", "export.dtype=fp32"]
    api.export(load_config("export", words))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def merged_base(run: TrainRun, folder: Path) -> Any:
    merged = f"model.merged_adapters=[{','.join(repr(one) for one in run.model.merged_adapters)}]"
    return exported(folder, "model=hub", f"model.path={run.model.path}", "model.tokenizer=bytes", merged)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None]).logits[0, :-1]


def assert_loads_elsewhere(run: TrainRun, folder: Path) -> None:
    """In plain PEFT on the exported base, and merged in plain transformers, it is what was trained."""
    under = merged_base(run, folder / "base")
    plain = logits(under)
    adapted = logits(PeftModel.from_pretrained(under, Path(run.output_dir) / "final").eval())
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(adapted, in_memory_logits(run, IDS), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(exported(folder / "whole", f"export.run={run.output_dir}")), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_new_adapter_on_a_merged_one(kind: str, base: Path, first: Path, chat_rows: str, cache: str, tmp_path: Path) -> None:
    steps = ["train.max_steps=6", "checkpoint.every_steps=2"]
    run = run_on(base, [first], [chat_rows, cache], tmp_path / "run", *SETTINGS[kind], *steps)
    api.train(run)
    cut = replace(run, output_dir=str(tmp_path / "cut"))
    with pytest.raises(PowerCut):
        api.train(cut, sinks=[cut_at(5)])
    assert api.train(cut).resumed_from == 4
    assert_same_run(run, cut)
    assert_loads_elsewhere(run, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "whole modules", "pissa with all variants"])
def test_an_adapter_that_is_continued_on_a_merged_one_and_one_on_both(
    kind: str, base: Path, first: Path, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    data, short = [chat_rows, cache], ["train.max_steps=2", "data.eval_fraction=0"]
    second = api.train(run_on(base, [first], data, tmp_path / "second", *SETTINGS[kind], *short)).final
    settings = SAVED_AS.get(kind, SETTINGS[kind])
    continued = run_on(base, [first], data, tmp_path / "third", *settings, f"adapter.path={second}", *short)
    api.train(continued)
    assert_loads_elsewhere(continued, tmp_path / "of_third")
    both = run_on(base, [first, second], data, tmp_path / "fourth", "adapter=lora", *short)
    api.train(both)
    assert_loads_elsewhere(both, tmp_path / "of_fourth")
