"""The zip that is uploaded with a job: the working folder and this package. Ray unpacks it on every node.

The same files give the same bytes, so that Ray's hash shows whether the cluster has the zip already.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from raytune_llm.config.overrides import CONF
from raytune_llm.errors import ConfigError

SOURCE = Path(__file__).resolve().parent.parent
EXAMPLES = CONF.parent / "examples"
CARRIED = {"raytune_llm": SOURCE, "raytune_llm/conf": CONF, "raytune_llm/examples": EXAMPLES}
"""Path in the zip -> folder of this package, in the layout of an installed wheel."""
LARGEST = 3
_TIME = (2020, 1, 1, 0, 0, 0)


def files_of(folder: Path, ignore: Sequence[str], *, max_mib: int) -> dict[str, Path]:
    """Path in the zip -> file, for the folder's files and for this package, unless the folder is its checkout.

    Raises ConfigError if the files are larger than max_mib MiB in total.
    """
    if not folder.is_dir():
        raise ConfigError("submit.folder", "must be a folder", got=str(folder))
    files = {name: folder / name for name in _names(folder) if not _ignored(name, ignore)}
    if (folder / "raytune_llm").resolve() != SOURCE:
        carried = {
            f"{place}/{path.relative_to(root).as_posix()}": path
            for place, root in CARRIED.items()
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        files = {**carried, **files}
    _check_size(files, max_mib)
    return files


def write_zip(files: Mapping[str, Path], to: Path) -> None:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if files[name].stat().st_mode & 0o100 else 0o644) << 16
            archive.writestr(entry, files[name].read_bytes())


def _names(folder: Path) -> Iterator[str]:
    """The folder's files; in a git checkout, those that git doesn't ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=folder, capture_output=True, check=False
    )
    if listing.returncode == 0:
        names = listing.stdout.decode().split("\0")
        yield from (name for name in names if name and (folder / name).is_file())
    else:
        yield from (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _ignored(name: str, ignore: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(fnmatch(part, pattern) for pattern in ignore for part in (*path.parts, *map(str, path.parents), name))


def _check_size(files: Mapping[str, Path], max_mib: int) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sum(sizes.values()) <= max_mib * 2**20:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:LARGEST]
    raise ConfigError(
        "submit.folder",
        f"must hold at most submit.max_mib={max_mib} MiB, got {sum(sizes.values()) / 2**20:.0f}: "
        + ", ".join(f"{name} ({sizes[name] / 2**20:.0f})" for name in largest),
        fix="Add what the run doesn't read to submit.ignore, put data on the cluster's storage, or raise submit.max_mib.",
    )
