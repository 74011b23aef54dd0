from __future__ import annotations

import pytest

from raytune_llm import ResourceError, load_sweep
from raytune_llm.tune.disk import check_disk, waiting

SPACE = ("+experiment=sft_smollm2", "resources=inline", "optimizer.lr=interval(1e-4,1e-2)", "tune.trials=12")


@pytest.mark.parametrize(
    ("words", "count"),
    [(["tune.scheduler=asha"], 6), (["tune.scheduler=pbt"], 12), (["tune.pause_at=0.1"], 12), (["tune.scheduler=none"], 0)],
)
def test_checkpoints_of_trials_that_wait_together_need_room(words, count, tmp_path):
    sweep = load_sweep([*SPACE, *words, f"output_dir={tmp_path}"])
    assert waiting(sweep) == count
    check_disk(sweep, 1)
    if count:
        with pytest.raises(ResourceError, match=rf"no room for {count} trials that wait with a checkpoint of [\d,.]+ \w+ each"):
            check_disk(sweep, 10**18)
    for number in range(count):
        (tmp_path / "trials" / f"{number:03d}" / "checkpoints").mkdir(parents=True)
    check_disk(sweep, 10**18)  # those of before an interruption are there
