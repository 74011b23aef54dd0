from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "ray", "transformers", "datasets", "pyarrow", "pandas"}
PROBE = """
import json, sys
from raytune_llm.__main__ import main
exit_code = main(sys.argv[1:])
print(json.dumps([exit_code, list(sys.modules)]))
"""


def run(*argv: str) -> tuple[int, set[str], str]:
    """Exit code, loaded modules and what went to stderr."""
    done = subprocess.run([sys.executable, "-c", PROBE, *argv], capture_output=True, text=True, check=True)
    exit_code, modules = json.loads(done.stdout.splitlines()[-1])
    return exit_code, set(modules), done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--help"]])
def test_help_answers_before_anything_heavy_is_loaded(argv):
    exit_code, modules, _ = run(*argv)
    assert exit_code == 0
    assert not modules & HEAVY


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["optimizer.lrr=1e-4"], "optimizer.lr"),
        (["train.epochs=0"], "train.epochs"),
        (["model=no_such_model"], "model"),
        (["trian"], "train"),
        (["import", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_a_mistake_in_a_setting_answers_before_anything_heavy_is_loaded(argv, said):
    exit_code, modules, stderr = run(*argv)
    assert exit_code == 2
    assert said in stderr
    assert "Traceback" not in stderr
    assert not modules & HEAVY
