"""A sweep with ASHA against its trials as commands, one after another to their end.

    scripts/bench tune [--trials 12] [--steps 60] [--again 2] [--set KEY=VALUE ...]

LoRA of SmolLM2-135M on the demo's task, settings drawn at random. The commands train the same points, and evaluate at their end
alone; the sweep is one command, which evaluates where ASHA compares. Prints JSON:

- `commands_s`, `sweep_s`: wall time, interpreters' starts included; `share`: of the commands' time (goal: 0.3).
- `best_of_commands`, `best_of_sweep`: held-out losses of the best; `excess`: how much more the sweep's is (goal: 0.02).
- `again_of_commands`, `again_of_sweep`: the mean losses of these two settings, trained again with `--again` other seeds, and
  `excess_again` (goal: 0.02). The best of twelve is the best by its luck, too, which it doesn't have a second time.
- `between_trials_s`: from one trial's end to the next one's first step, the slowest (goal: 2).
- `outside_trials_s`: of the sweep's time, what is no trial's: start, preparation, results, plots.
- `load_average` at the beginning: with more than 1, other work took part of the machine, and times are too long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raytune_llm import load_sweep
from raytune_llm.config.plain import to_yaml
from raytune_llm.config.space import Point
from raytune_llm.config.sweep import Sweep

AGAIN = ("again_of_commands", "again_of_sweep")


def make_sweep(folder: Path, trials: int, steps: int, settings: Sequence[str]) -> Sweep:
    return load_sweep(
        [
            "+experiment=sft_smollm2", "tune=asha", f"tune.trials={trials}", f"train.max_steps={steps}",
            "train.exact_match_rows=0", "data.eval_fraction=0.0364",
            "tracking=none", "optimizer.lr=tag(log,interval(3e-4,2e-2))", "adapter.rank=8,16,32",
            f"data.cache={folder / 'cache'}", f"output_dir={folder / 'sweep'}", *settings,
        ]
    )  # fmt: skip


def run_commands(sweep: Sweep, points: Sequence[Point], folder: Path, steps: int, seed: int) -> list[float]:
    """Each point by a command of its own: the held-out loss of each."""
    losses = []
    for number, point in enumerate(points):
        name = f"{seed}_{number}"
        run = sweep.trial_run(point, seed=seed, folder=folder / f"command{name}")
        run = replace(run, train=replace(run.train, eval_every_steps=steps))
        (folder / f"trial{name}.yaml").write_text(to_yaml(run))
        command = ["-m", "raytune_llm", "--config-dir", str(folder), "--config-name", f"trial{name}"]
        subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
        records = (folder / f"command{name}" / "metrics.jsonl").read_text().splitlines()
        losses.append([loss for line in records if (loss := json.loads(line).get("eval_loss")) is not None][-1])
    return losses


def trained_again(sweep: Sweep, points: Sequence[Point], folder: Path, steps: int, times: int) -> list[float]:
    """The mean held-out loss of each point with so many other seeds."""
    first = sweep.base.train.seed + 1
    each = [run_commands(sweep, points, folder, steps, seed) for seed in range(first, first + times)]
    return [statistics.fmean(losses) for losses in zip(*each, strict=True)]


def run_sweep_here(sweep: Sweep) -> dict[str, Any]:
    """In this process: what each trial took, and the times between."""

    from raytune_llm import api
    from raytune_llm.report.updates import RunStarted
    from raytune_llm.tune.run import run_sweep

    began: list[float] = []
    first_steps: list[float] = []
    ends: list[float] = []

    def train(run: Any, *, on_update: Any, **others: Any) -> Any:
        def update(said: Any) -> None:
            on_update(said)
            if isinstance(said, RunStarted):
                first_steps.append(time.perf_counter())

        began.append(time.perf_counter())
        try:
            return api.train(run, on_update=update, **others)
        finally:
            ends.append(time.perf_counter())

    result = run_sweep(sweep, train)
    between = [first - end for end, first in zip(ends, first_steps[1:], strict=False)]
    trials = result.study.trials
    return {
        "best_of_sweep": result.best.value,
        "best": dict(result.best.point),
        "stopped": sum(trial.state == "stopped" for trial in trials),
        "steps_made": round(sum(trial.step for trial in trials) / sum(trial.total_steps or 0 for trial in trials), 3),
        "in_trials_s": round(sum(end - start for start, end in zip(began, ends, strict=True)), 2),
        "between_trials_s": round(max(between), 2),
        "between_trials_median_s": round(statistics.median(between), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--again", type=int, default=2, help="seeds that both best settings are trained with once more")
    parser.add_argument("--set", nargs="*", default=[], help="settings of all trials, as on the command line")
    parser.add_argument("--sweep-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sweep_in is not None:
        print(json.dumps(run_sweep_here(make_sweep(arguments.sweep_in, arguments.trials, arguments.steps, arguments.set))))
        return
    load = os.getloadavg()[0]
    with TemporaryDirectory() as name:
        alone = Path(name) / "commands"
        alone.mkdir()
        sweep = make_sweep(alone, arguments.trials, arguments.steps, arguments.set)
        began = time.perf_counter()
        losses = run_commands(sweep, sweep.planned, alone, arguments.steps, sweep.base.train.seed)
        commands_s = time.perf_counter() - began
        began = time.perf_counter()
        itself = [sys.executable, __file__, *sys.argv[1:], "--sweep-in", f"{name}/sweep"]
        found = json.loads(subprocess.run(itself, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        sweep_s = time.perf_counter() - began
        best = [sweep.planned[losses.index(min(losses))], found.pop("best")]
        losses_again = trained_again(sweep, best, alone, arguments.steps, arguments.again)
        again: dict[str, float] = dict(zip(AGAIN, losses_again, strict=False))
    if again:
        again["excess_again"] = round(again[AGAIN[1]] / again[AGAIN[0]] - 1, 4)
    results = {
        "trials": arguments.trials,
        "steps": arguments.steps,
        "commands_s": round(commands_s, 1),
        "sweep_s": round(sweep_s, 1),
        "share": round(sweep_s / commands_s, 3),
        "best_of_commands": min(losses),
        **found,
        "excess": round(found["best_of_sweep"] / min(losses) - 1, 4),
        **again,
        "outside_trials_s": round(sweep_s - found["in_trials_s"], 1),
        "load_average": round(load, 1),
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
