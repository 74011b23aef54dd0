"""What of an earlier run's lines is kept."""

from __future__ import annotations

import json

import pytest

from raytune_llm.predict.predictions import FILE, open_predictions

LINE = json.dumps({"row": 1, "model": "base", "prompt": "p", "predict": "a", "label": None}) + "\n"


@pytest.mark.parametrize(
    "left", [LINE[:20], '{"row": 2}\n', "[2]\n", "2\n", "\n", "{" * 50_000 + "\n", LINE.replace("1", "2")[:-1]]
)
def test_a_line_that_is_not_whole_is_cut_off_with_what_comes_after_it(tmp_path, left):
    settings = {"seed": 1}
    open_predictions(tmp_path, settings, resume=True, models=1)
    (tmp_path / FILE).write_text(LINE + left)
    assert open_predictions(tmp_path, settings, resume=True, models=1) == 1
    assert (tmp_path / FILE).read_text() == LINE
