"""The page of plots of a sweep."""

from __future__ import annotations

from raytune_llm.tune import page
from tests.unit.tune.test_study import study_in, to_the_end


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
