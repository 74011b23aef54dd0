"""What cluster/slurm/train.sbatch says before it needs Slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "cluster" / "slurm" / "train.sbatch"


@pytest.mark.parametrize(
    ("arguments", "python", "problem"),
    [
        (["+experiment=sft_qwen"], sys.executable, "output_dir must be an absolute path or a URI"),
        (["+experiment=sft_qwen", "output_dir=outputs/mine"], sys.executable, "got outputs/mine"),
        (["output_dir=/shared/mine"], "/nowhere/python", "no Python with Ray at /nowhere/python"),
    ],
)
def test_a_job_that_could_not_resume_is_refused(arguments, python, problem):
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "PYTHON": python}
    done = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert problem in done.stderr
