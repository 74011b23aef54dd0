from __future__ import annotations

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config

pytestmark = pytest.mark.ray


def test_two_actors_give_the_predictions_of_one_process(tmp_path, chat_rows):
    files = []
    for place in ("inline", "local"):
        where = [f"resources={place}", *(["resources.num_workers=2"] if place == "local" else [])]
        settings = ["model=tiny_random", f"data.path={chat_rows}", f"output_dir={tmp_path / place}", *where]
        done = api.predict(load_config("predict", [*settings, "predict.max_new_tokens=6", "predict.score=true"]))
        assert done.rows == 61
        files.append((done.folder / "predictions.jsonl").read_bytes())
    assert files[0] == files[1]
