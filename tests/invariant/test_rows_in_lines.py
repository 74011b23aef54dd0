"""Models that need a line for each row: the same run whatever a batch holds, and refused where packs or answers are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm import ConfigError, api
from tests.group import metrics
from tests.runs import tiny_run

MODELS = {
    "mamba": "{model_type: mamba, hidden_size: 32, state_size: 4, num_hidden_layers: 2}",
    "bloom": "{model_type: bloom, hidden_size: 32, n_layer: 2, n_head: 4}",
}


def run_of(model: str, rows: str, cache: str, folder: Path, *settings: str):
    made = ["model=hub", "model.path=null", "model.weights=random", "model.tokenizer=bytes", f"model.config={MODELS[model]}"]
    return tiny_run(rows, cache, folder, *made, "train.max_steps=3", "data.eval_fraction=0", *settings)


def losses(*run: object) -> list[float]:
    api.train(run_of(*run))  # type: ignore[arg-type]
    return [record["loss"] for record in metrics(str(run[3]))]


def pair(asked: str, *answers: str) -> dict[str, object]:
    chosen, rejected = ({"role": "assistant", "content": answer} for answer in answers)
    return {"messages": [{"role": "user", "content": asked}], "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("model", MODELS)
def test_rows_beside_each_other_in_a_batch_train_as_one_after_another(
    model: str, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    runs = (["train.micro_batch_size=1"], ["train.micro_batch_size=4"])
    one, four = (
        losses(model, chat_rows, cache, tmp_path / str(n), "data.packing=false", *changes) for n, changes in enumerate(runs)
    )
    assert one == pytest.approx(four, rel=1e-5)
    assert len(set(one)) == 3


def test_pairs_train_as_well(cache: str, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    answers = [("yes " * (n % 5 + 1), "no " * (n % 3 + 1)) for n in range(24)]
    pairs.write_text("".join(f"{json.dumps(pair(f'Is {n} a number?', *both))}\n" for n, both in enumerate(answers)))
    settings = ["stage=dpo", "data=chat_pairs", "data.packing=false"]
    one, two = (
        losses("bloom", str(pairs), cache, tmp_path / str(size), *settings, f"train.micro_batch_size={size}") for size in (1, 2)
    )
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], r"data\.packing must be false for mamba"),
        (["data.packing=false", "model.attention=sdpa"], r"model\.attention must be auto for mamba"),
        (
            ["data.packing=false", "data.eval_fraction=0.1", "train.eval_every_steps=1", "train.sample_rows=1"],
            r"train\.sample_rows must be 0 for mamba, .*predict engine=hf",
        ),
    ],
)
def test_what_such_a_model_does_not_do_is_refused_before_anything_is_written(
    settings: list[str], said: str, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        api.train(run_of("mamba", chat_rows, cache, tmp_path / "run", *settings))
    assert not (tmp_path / "run").exists()
