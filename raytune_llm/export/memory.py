"""Where an export can be compared with its source: both are computed in float32, one after the other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import psutil
import torch

FREE_TIMES = 1.5
"""Memory for the model in float32, so many times over."""
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of a control group's limit and of what is in use, and the part of that in memory.stat which is given up when memory is
needed; of cgroup v2 and v1."""


def device_for(num_numbers: int) -> torch.device | None:
    """None: there is no memory for a model of so many numbers. A GPU takes it where it has room beside what is there already."""
    return _device(int(4 * FREE_TIMES * num_numbers), host_free_bytes(), _gpu_free_bytes())


def _device(needed: int, host_free: int, gpu_free: int | None) -> torch.device | None:
    """A model is read into the host's memory on its way to a GPU."""
    if host_free <= needed:
        return None
    return torch.device("cuda" if gpu_free is not None and gpu_free > needed else "cpu")


def _gpu_free_bytes() -> int | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def host_free_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """What this process may still take: of the machine's memory, and of the limits of its control groups (a container's)."""
    return min([psutil.virtual_memory().available, *_free_in_groups(cgroups, own)])


def _free_in_groups(cgroups: Path, own: Path) -> list[int]:
    found = []
    for folder in _groups(cgroups, own):
        for limit_file, used_file, cached in LIMITS:
            try:
                limit, used = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(max(0, limit - used + int(stat.get(cached, 0))))
            except (OSError, ValueError):
                continue  # not there, or `max`
    return found


def _groups(cgroups: Path, own: Path) -> set[Path]:
    """The process's groups and those around them, as far as they can be seen from here."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return set()
    found: set[Path] = set()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            root = cgroups / controllers
            place = root / name.strip("/")
            found |= {root, place, *(parent for parent in place.parents if parent.is_relative_to(root))}
    return found


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host, also where another error tells of it."""
    told = any(text in str(error) for text in ("DefaultCPUAllocator", os.strerror(errno.ENOMEM)))
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
