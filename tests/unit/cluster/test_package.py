"""What travels to a cluster: the folder without what is ignored, and this package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from raytune_llm.cluster.package import SOURCE, files_of, write_zip
from raytune_llm.cluster.requirements import pinned, requirements
from raytune_llm.errors import ConfigError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("rows.jsonl", "conf/mine.yaml", "outputs/big.bin", "deep/outputs/x", "notes.pyc"):
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "work"


def own(files: dict[str, Path]) -> set[str]:
    return {name for name in files if not name.startswith("raytune_llm/")}


def test_what_is_ignored_stays(folder):
    assert own(files_of(folder, ["outputs", "*.pyc"], max_mib=100)) == {"rows.jsonl", "conf/mine.yaml"}
    assert own(files_of(folder, ["deep/outputs", "conf/*"], max_mib=100)) == {"rows.jsonl", "outputs/big.bin", "notes.pyc"}
    assert own(files_of(folder, ["outputs/", "./conf"], max_mib=100)) == {"rows.jsonl", "notes.pyc"}, "as in .gitignore"


def test_what_git_ignores_stays(folder):
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / ".gitignore").write_text("*.pyc\nrows.jsonl\n")
    assert own(files_of(folder, ["outputs"], max_mib=100)) == {".gitignore", "conf/mine.yaml"}


def test_a_checkout_in_a_checkout_travels_without_what_it_ignores(folder):
    for place in (folder, folder / "deep"):
        subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    (folder / "deep" / ".gitignore").write_text("*.log\n")
    for name in ("code.py", "large.log"):
        (folder / "deep" / name).write_text(name)
    assert {"deep/code.py", "deep/.gitignore"} <= own(files_of(folder, ["outputs"], max_mib=100))
    assert "deep/large.log" not in files_of(folder, [], max_mib=100)


@pytest.mark.parametrize("in_git", [False, True])
def test_a_name_that_no_zip_can_hold_is_refused_unless_it_is_ignored(folder, in_git):
    if in_git:
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    with pytest.raises(ConfigError, match=r"submit\.folder must hold files whose names are UTF-8, got 'caf.*dce9\.txt'"):
        files_of(folder, [], max_mib=100)
    assert "rows.jsonl" in files_of(folder, ["*.txt"], max_mib=100)


def test_a_file_that_can_t_be_read_and_a_full_disk_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"submit\.folder must hold files that can be read \(No such file.*got 'gone\.txt'"):
        write_zip({"gone.txt": folder / "gone.txt"}, tmp_path / "package.zip")
    with pytest.raises(ResourceError, match=r"/dev can't hold what is sent with the job \(No space left.*TMPDIR"):
        write_zip({"rows.jsonl": folder / "rows.jsonl"}, Path("/dev/full"))


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(folder):
    (folder / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(ConfigError, match=r"submit\.max_mib=2 MiB, got \d+: weights.bin \(3\)"):
        files_of(folder, [], max_mib=2)


def test_the_package_that_travels_runs_by_itself(folder, tmp_path):
    write_zip(files_of(folder, [], max_mib=100), tmp_path / "package.zip")
    place = tmp_path / "there"
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        archive.extractall(place)
    code = "import raytune_llm, raytune_llm.config.load as load; print(raytune_llm.__file__, load.CONF, load.EXAMPLES.is_dir())"
    said = subprocess.run([sys.executable, "-c", code], cwd=place, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert said.stdout.split() == [f"{place}/raytune_llm/__init__.py", f"{place}/raytune_llm/conf", "True"], said.stderr


def test_a_checkout_carries_itself_once():
    files = files_of(SOURCE.parent, [".git", ".venv", "outputs", "tests", "benchmarks"], max_mib=100)
    assert "conf/train.yaml" in files and "raytune_llm/conf/train.yaml" not in files
    assert files["raytune_llm/api.py"] == SOURCE.parent / "raytune_llm/api.py"


def test_the_same_files_make_the_same_bytes(folder, tmp_path):
    for name in ("one.zip", "two.zip"):
        write_zip(files_of(folder, [], max_mib=100), tmp_path / name)
        (folder / "rows.jsonl").touch()
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_pinned_requirements_are_those_of_this_machine_without_ray_and_build_labels():
    pins = dict(str(pin).split("==") for pin in map(Requirement, pinned()))
    assert pins["torch"] == version("torch").partition("+")[0]
    assert {"transformers", "peft", "filelock"} <= pins.keys() and not {"ray", "raytune-llm", "pytest"} & pins.keys()


def test_a_requirements_file_is_read_here(tmp_path):
    (tmp_path / "more.txt").write_text("# what we add\nrich==14.0\n\n")
    assert requirements(str(tmp_path / "more.txt")) == ["rich==14.0"]
    with pytest.raises(ConfigError, match=r"submit\.requirements must be pinned or a file"):
        requirements("no_such.txt")
    lines = "six  # why\n--index-url https://mirror/simple\nnumpy==2.0 \\\n  --hash=sha256:abc\nmine @ https://host/mine.whl\n"
    (tmp_path / "more.txt").write_text(lines)
    numpy = "numpy==2.0    --hash=sha256:abc"
    assert requirements(str(tmp_path / "more.txt")) == [
        "six",
        "--index-url https://mirror/simple",
        numpy,
        "mine @ https://host/mine.whl",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"-r other.txt", "must have no lines that name other files"),
        (b"-rother.txt", "must have no lines that name other files"),
        (b"-c ../constraints.txt", "must have no lines that name other files"),
        (b"./mine-1.0.whl", "must have no lines that name other files"),
        (b"-e .", "must have no lines that name other files"),
        (b"rich=14.0", "must have lines that pip can read"),
        (b"\xff\xfe", "it is not in UTF-8"),
    ],
)
def test_requirements_that_no_node_could_install_are_refused_here(tmp_path, line, said):
    (tmp_path / "more.txt").write_bytes(line)
    with pytest.raises(ConfigError, match=said):
        requirements(str(tmp_path / "more.txt"))
