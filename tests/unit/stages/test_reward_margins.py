"""By how much the better answer of a pair is to score higher: what the row says, and what the setting says beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from raytune_llm import ConfigError, load_config
from raytune_llm.data.dropped import BadRow
from raytune_llm.data.formats import Reading, convert
from raytune_llm.data.kinds.pairs import PairRow
from raytune_llm.losses.reward import bradley_terry
from tests.steps import make_store, objective_of, run_step, step_of

REWARD = ["stage=reward", "data.path=rows.jsonl", "data.format.margin=margin"]
ROWS = {
    "alpaca_pairs": {"instruction": "q", "chosen": "a", "rejected": "b"},
    "chat_pairs": {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
    "prompt_completion_pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "sharegpt_pairs": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "openai_pairs": {
        "messages": [{"role": "user", "content": "q"}],
        "chosen": {"role": "assistant", "content": "a"},
        "rejected": {"role": "assistant", "content": "b"},
    },
}


class Lengths(nn.Module):
    """Scores each document by the number of its tokens, times what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, batch):
        return self.weight * batch.cu_seqlens_S.diff()


@pytest.mark.parametrize("packing", [True, False])
def test_each_pair_has_its_own_margin_beside_the_settings(tmp_path, packing):
    lengths, margins = [(1, 4, 2), (2, 1, 3), (3, 5, 5), (1, 2, 6)], [0.0, 1.0, 0.25, 3.0]
    parts = [[np.ones(length, np.int32) for length in row] for row in lengths]
    store = make_store(tmp_path, "pairs", [PairRow(*row, margin) for row, margin in zip(parts, margins, strict=True)])
    step = step_of(store, max_length=12, packing=packing, micro=1)
    prompt, chosen, rejected = torch.tensor(lengths).unbind(1)
    wanted = bradley_terry(0.5 * (prompt + chosen), 0.5 * (prompt + rejected), torch.tensor(margins) + 0.5).mean()
    out = run_step(Lengths(), objective_of("stage=reward", "stage.margin=0.5"), step)
    assert out.loss == pytest.approx(wanted.item())


@pytest.mark.parametrize("data", ROWS)
def test_a_row_of_any_format_can_say_its_margin(data):
    format = load_config("prepare", ["model=tiny_random", f"data={data}", *REWARD]).data.format
    assert convert({**ROWS[data], "margin": None}, format).margin == 0.0
    with pytest.raises(BadRow, match=r"there is no column 'margin' \(data\.format\.margin\)"):
        convert(ROWS[data], format)
    assert convert({**ROWS[data], "margin": 2}, format).margin == 2.0
    assert convert({**ROWS[data], "margin": "1.5"}, format, Reading(untyped=True)).margin == 1.5
    for value in (-1, True, "1.5", float("nan"), float("inf")):
        with pytest.raises(BadRow, match="a margin must be a number that is not negative"):
            convert({**ROWS[data], "margin": value}, format)


def test_only_reward_models_learn_margins():
    with pytest.raises(ConfigError, match=r"data\.format\.margin is not read with stage=dpo"):
        load_config("train", ["data=chat_pairs", "stage=dpo", *REWARD[1:]])
