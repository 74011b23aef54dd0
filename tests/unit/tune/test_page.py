"""The page of plots of a sweep."""

from __future__ import annotations

import math

from raytune_llm.tune import page
from tests.unit.tune.test_study import study_in, to_the_end


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_long_values_are_cut_in_their_middle_and_set_aslant(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "save", lambda figure, path: drawn.append(figure))
    lists = "[q_proj],[q_proj,k_proj,v_proj,o_proj],[q_proj,k_proj,v_proj,down_proj]"
    study = study_in(tmp_path, "tune=grid", f"adapter.targets={lists}", "adapter.rank=4,8")
    to_the_end(study)
    page.sweep_page(study, tmp_path / "sweep.png")
    _, parallel, targets, ranks = drawn[0].axes
    labels = targets.get_xticklabels()
    assert texts(labels) == ["[q_proj]", "[q_proj,…o_proj]", "[q_proj,…n_proj]"]
    assert {label.get_rotation() for label in labels} == {30.0} and ranks.get_xticklabels()[0].get_rotation() == 0
    assert max(map(len, texts(parallel.texts))) <= page.LONGEST


def test_the_bases_value_stands_beside_those_of_the_list(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "save", lambda figure, path: drawn.append(figure))
    study = study_in(tmp_path, "tune=random", "tune.trials=3", "tune.base_first=true", "schedule=constant,linear")
    to_the_end(study)
    page.sweep_page(study, tmp_path / "sweep.png")
    _, parallel, *_, ranks, schedules = drawn[0].axes
    assert texts(schedules.get_xticklabels()) == ["constant", "linear", "cosine"]
    assert texts(ranks.get_xticklabels()) == ["4", "8", "16"]
    assert len(schedules.lines) == 3 and not any(math.isnan(y) for line in parallel.lines for y in line.get_ydata())


def test_numbers_of_a_list_stand_in_their_order_whatever_the_order_that_they_were_typed_in(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "save", lambda figure, path: drawn.append(figure))
    study = study_in(tmp_path, "tune=grid", "adapter.rank=16,4,8", "schedule=cosine,constant")
    to_the_end(study)
    page.sweep_page(study, tmp_path / "sweep.png")
    *_, ranks, schedules = drawn[0].axes
    assert [label.get_text() for label in ranks.get_xticklabels()] == ["4", "8", "16"]
    assert [label.get_text() for label in schedules.get_xticklabels()] == ["cosine", "constant"]
    shown = {trial.point["adapter.rank"]: trial.latest for trial in study.trials if trial.point.get("schedule") == "cosine"}
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ranks.lines}
    assert {(place, shown[rank]) for place, rank in enumerate((4, 8, 16))} <= points


def test_dollar_signs_in_values_are_no_formulas(tmp_path):
    study = study_in(tmp_path, "tune=grid", r"adapter.targets='q$|.*\d$','.*v_proj'", "name=$x_")
    to_the_end(study)
    page.sweep_page(study, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
