"""What a model's folder holds, as far as answers depend on it."""

from __future__ import annotations

import pytest

from raytune_llm.runs.contents import folder_contents


@pytest.mark.parametrize("written", ["predict.json", "metrics.json", "results.json", "export.json", "predictions.jsonl"])
def test_what_is_written_into_a_models_folder_by_what_asks_it_changes_no_contents(tmp_path, written):
    (tmp_path / "config.json").write_text("{}")
    before = folder_contents(tmp_path)
    (tmp_path / written).write_text("{}")
    assert folder_contents(tmp_path) == before
    (tmp_path / "tokenizer.json").write_text("{}")
    assert folder_contents(tmp_path) != before
