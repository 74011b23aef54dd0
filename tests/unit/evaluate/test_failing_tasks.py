"""Tasks of lm-evaluation-harness that fail as they are asked: what is at fault is said."""

from __future__ import annotations

import json

import pytest

from raytune_llm import api
from raytune_llm.config.load import load_config
from raytune_llm.errors import DataError

pytest.importorskip("lm_eval")

TASK = """
task: few
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: [a, b]
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc}}]
"""


def test_more_shots_than_examples_are_an_error_with_their_reason(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": str(n), "a": 0}) + "\n" for n in range(3)))
    (tmp_path / "few.yaml").write_text(TASK.format(folder=tmp_path))
    words = ["model=tiny_random", "evaluate.protocol=lm_eval", f"evaluate.tasks=[{tmp_path}/few.yaml]", "evaluate.shots=9"]
    with pytest.raises(DataError, match=r"can't be asked or scored \(ValueError: .*arger than population"):
        api.evaluate(load_config("evaluate", [*words, f"output_dir={tmp_path / 'out'}"]))
