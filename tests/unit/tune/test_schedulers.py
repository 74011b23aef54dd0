"""Which trials go on."""

from __future__ import annotations

from raytune_llm.tune.schedulers import Asha, Hyperband, Median


def test_asha_lets_the_first_trial_at_a_rung_go_on_and_of_the_others_those_among_the_best_part():
    asha = Asha(grace=0.1, reduction=3)
    assert asha.goes_on(0, 0.1, 5.0)
    assert not asha.goes_on(1, 0.1, 6.0)
    assert asha.goes_on(2, 0.1, 4.0)
    assert [asha.goes_on(trial, 0.1, 4.5) for trial in (3, 4)] == [False, False]
    assert asha.goes_on(5, 0.1, 4.2)  # the second of six


def test_asha_asks_at_rungs_alone():
    asha = Asha(grace=0.2, reduction=2)
    assert asha.goes_on(0, 0.2, 1.0)
    assert asha.goes_on(1, 0.1, 9.0) and not asha.goes_on(1, 0.2, 9.0)
    assert asha.goes_on(2, 0.2, 0.5) and asha.goes_on(2, 0.3, 9.0)  # no rung there


def test_rungs_end_where_little_is_left_to_save_and_there_is_one_at_least():
    assert Asha(grace=0.1, reduction=3).rungs(0) == (0.1, 0.3)
    assert Asha(grace=0.25, reduction=2).rungs(0) == (0.25, 0.5)
    assert Asha(grace=0.5, reduction=3).rungs(0) == (0.5,)
    assert [Hyperband(grace=0.1, reduction=3).rungs(trial) for trial in range(4)] == [(0.1, 0.3), (0.3,), (0.9,), (0.1, 0.3)]


def test_what_is_no_number_is_worst():
    asha = Asha(grace=0.5, reduction=2)
    asha.goes_on(0, 0.5, 1.0)
    assert not asha.goes_on(1, 0.5, float("inf"))


def test_hyperband_judges_some_trials_later():
    band = Hyperband(grace=0.1, reduction=3)
    for trial in (0, 1, 2):
        assert band.goes_on(trial, 0.1, 1.0) and band.goes_on(trial, 18 / 60, 1.0)
    assert not band.goes_on(3, 0.1, 2.0)  # the bracket of trial 0
    assert band.goes_on(4, 0.1, 2.0) and not band.goes_on(4, 18 / 60, 2.0)  # of trial 1


def test_the_median_rule_ends_what_never_came_near_the_others_means():
    rule = Median(grace=0.1)
    for trial, score in enumerate((1.0, 2.0, 3.0)):
        assert rule.goes_on(trial, 0.5, score)
    assert not rule.goes_on(3, 0.5, 2.5)
    assert rule.goes_on(4, 0.5, 1.5)
