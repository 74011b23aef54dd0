"""The zip that is uploaded with a job: the working folder and this package. Ray unpacks it on every node.

The same files give the same bytes, so that Ray's hash shows whether the cluster has the zip already.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from raytune_llm.config.overrides import CONF
from raytune_llm.errors import ConfigError, ResourceError

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
    patterns = [pattern.removeprefix("./").rstrip("/") for pattern in ignore]
    files = {name: folder / name for name in _names(folder, patterns) if not _ignored(name, patterns)}
    for name in files:
        _check_name(name)
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
    """Raises ConfigError for a file that can't be read, and ResourceError where there is no room for the zip."""
    try:
        with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in sorted(files):
                entry = zipfile.ZipInfo(name, _TIME)
                entry.compress_type = zipfile.ZIP_DEFLATED
                mode, content = _read(name, files[name])
                entry.external_attr = (0o755 if mode & 0o100 else 0o644) << 16
                archive.writestr(entry, content)
    except OSError as error:
        raise ResourceError(
            f"{to.parent} can't hold what is sent with the job ({error.strerror or error})",
            "Free some space there, or set TMPDIR to a larger folder.",
        ) from None


def _read(name: str, path: Path) -> tuple[int, bytes]:
    try:
        return path.stat().st_mode, path.read_bytes()
    except OSError as error:
        rule = f"must hold files that can be read ({error.strerror})"
        raise ConfigError("submit.folder", rule, got=name, fix="Add it to submit.ignore, or change its permissions.") from None


def _names(folder: Path, ignore: Sequence[str]) -> Iterator[str]:
    """The folder's files; in a git checkout, those that git doesn't ignore, also of checkouts in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except OSError:
        listing = None  # no git here
    if listing is None or listing.returncode:
        yield from _all_names(folder, ignore)
        return
    for name in os.fsdecode(listing.stdout).split("\0"):
        path = folder / name
        if name and path.is_file():
            yield name
        elif name and path.is_dir() and not path.is_symlink():  # of a submodule or another checkout git says no more
            prefix = name.rstrip("/")
            yield from (f"{prefix}/{inner}" for inner in _names(path, ignore))


def _all_names(folder: Path, ignore: Sequence[str]) -> Iterator[str]:
    """Folders that are ignored, which may be large, are not entered."""
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        folders[:] = [name for name in folders if not _ignored((here / name).as_posix(), ignore)]
        yield from ((here / name).as_posix() for name in names if Path(place, name).is_file())


def _ignored(name: str, patterns: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    return any(fnmatch(part, pattern) for pattern in patterns for part in (*path.parts, *map(str, path.parents), name))


def _check_name(name: str) -> None:
    """Raises ConfigError for a name that no zip can hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        rule, shown = "must hold files whose names are UTF-8", name.encode(errors="backslashreplace").decode()
        raise ConfigError("submit.folder", rule, got=shown, fix="Rename it, or add it to submit.ignore.") from None


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
