"""The wheel, installed beside the checkout's packages and used from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.long

RunPython = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, REPOSITORY]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder / "site", wheel]
    subprocess.run(install, check=True)
    return folder / "site"


@pytest.fixture
def run_python(installed: Path, tmp_path: Path) -> RunPython:
    """Python in an empty folder, with the installed package before the checkout's."""

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_installed_package_is_the_one_that_runs(installed, run_python):
    found = run_python("-c", "import raytune_llm; print(raytune_llm.__file__)")
    assert Path(found.strip()) == installed / "raytune_llm" / "__init__.py"


def test_help_lists_the_experiments_of_the_wheel(run_python):
    assert "sft_full_tiny" in run_python("-m", "raytune_llm", "--help")


def test_the_wheel_carries_the_example_data(run_python, installed):
    script = "from raytune_llm import load_config; print(load_config('train', ['+experiment=sft_smollm2']).data.path)"
    path = Path(run_python("-c", script).strip())
    assert path.is_relative_to(installed)
    assert path.read_bytes() == (REPOSITORY / "examples" / path.name).read_bytes()


def test_the_wheel_carries_the_files_that_lie_beside_the_code(installed):
    package = REPOSITORY / "raytune_llm"
    beside = {path.relative_to(package) for path in package.rglob("*") if path.suffix in (".jinja", ".yaml")}
    assert beside
    assert {name for name in beside if not (installed / "raytune_llm" / name).exists()} == set()


def test_a_tiny_run_works_from_an_empty_folder(run_python, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(20):
            turns = [{"role": "user", "content": f"double {number}"}, {"role": "assistant", "content": str(2 * number)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    run_python(
        *["-m", "raytune_llm", "model=tiny_random", "adapter=none", "resources=inline", f"data.path={rows}"],
        *[f"data.cache={tmp_path / 'cache'}", "data.max_length=128", "train.max_steps=2", "train.global_batch_size=1"],
    )
    output = tmp_path / "outputs" / "run"
    assert json.loads((output / "summary.json").read_text())["steps"] == 2
    assert (output / "final" / "model.safetensors").exists()
