from __future__ import annotations

import io

from rich.console import Console

from raytune_llm.report.progress_bar import ProgressBar, describe


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def shown(total_steps, records, *, first_step=0, seconds_per_step=1.0, terminal=False):
    file, clock = io.StringIO(), Clock()
    bar = ProgressBar(total_steps, first_step, console=Console(file=file, force_terminal=terminal, width=120), clock=clock)
    for record in records:
        clock.now_s = record["step"] * seconds_per_step
        bar.update(record)
    bar.close()
    return file.getvalue()


def steps(first, last):
    return [{"step": step, "loss": 1 / step, "tokens_per_s": 1234.5} for step in range(first, last + 1)]


def test_without_a_terminal_a_short_run_says_a_line_every_tenth():
    lines = shown(100, steps(1, 100), seconds_per_step=0.01).splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in (*range(1, 100, 10), 100)]
    assert "\x1b" not in "".join(lines)


def test_without_a_terminal_a_long_run_says_a_line_every_ten_seconds():
    lines = shown(100_000, steps(1, 60)).splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100000" for step in range(1, 60, 10)]


def test_a_line_has_loss_rate_and_time_left():
    last = shown(100, steps(1, 31), seconds_per_step=2.0).splitlines()[-1]
    assert last == "step 31/100  loss 0.0323  1,234 tokens/s  0:02:18 left"


def test_time_left_leaves_the_warm_up_out():
    bar_file, clock = io.StringIO(), Clock()
    bar = ProgressBar(11, console=Console(file=bar_file), clock=clock)
    for step, now_s in ((1, 100.0), (2, 101.0)):
        clock.now_s = now_s
        bar.update({"step": step})
    assert "0:00:09 left" in bar_file.getvalue()


def test_a_resumed_run_counts_from_where_it_was():
    lines = shown(100, steps(51, 60)).splitlines()
    assert lines[0].startswith("step 51/100")


def test_the_last_eval_loss_stays_in_sight():
    records = [{"step": 1, "eval_loss": 0.25}, {"step": 2, "loss": 0.5}]
    assert "loss 0.5000  eval 0.2500" in shown(2, records)


def test_on_a_terminal_one_line_moves():
    text = shown(10, steps(1, 10), terminal=True)
    assert "10/10" in text
    assert "loss 0.1000" in text
    assert "\x1b[" in text


def test_what_was_not_measured_is_not_said():
    assert describe({"step": 1}, None) == ""
    assert describe({"step": 1, "loss": 2.0}, 61) == "loss 2.0000  0:01:01 left"
