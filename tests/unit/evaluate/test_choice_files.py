"""Files of multiple-choice benchmarks in LLaMA-Factory's layout, as users have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_llm.errors import DataError
from raytune_llm.evaluate.choice_files import read_task

ROW = "What is it?,a,b,c,d,D\n"
MAPPING = json.dumps({"virology": {"name": "virology", "category": "Other"}})


def written(folder: Path, *, mapping: str = MAPPING, rows: str = ROW) -> Path:
    place = folder / "mmlu"
    for split in ("test", "dev"):
        (place / "data" / split).mkdir(parents=True)
        (place / "data" / split / f"virology_{split}.csv").write_text(rows, encoding="utf-8")
    (place / "mapping.json").write_text(mapping, encoding="utf-8")
    return folder


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_blank_lines_and_marks_of_byte_order_are_passed_over(tmp_path, mark):
    (subject,) = read_task("mmlu_test", written(tmp_path, mapping=mark + MAPPING, rows=f"{mark}{ROW}\n{ROW}\n"))
    assert [question.question for question in subject.questions] == ["What is it?"] * 2


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({}, "names no subject"),
        ({"virology": {"name": None, "category": "Other"}}, "must give each subject a name and a category"),
        ({"virology": {"name": "virology", "category": "Average"}}, "which is neither Average nor has a slash"),
        ({"virology": {"name": "virology", "category": "Other/a"}}, "which is neither Average nor has a slash"),
        ({"virology": {"name": "virology"}}, "must be an object of subjects"),
    ],
)
def test_subjects_without_a_name_and_categories_that_would_be_counted_twice_are_refused(tmp_path, mapping, said):
    with pytest.raises(DataError, match=rf"mapping\.json: .*{said}"):
        read_task("mmlu_test", written(tmp_path, mapping=json.dumps(mapping)))
