"""The device on which an export is compared with its source; both are computed in float32, one after the other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import psutil
import torch

FREE_TIMES = 1.5
"""The free memory that is needed, in multiples of the model's size in float32."""
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""For cgroup v2 and v1: the files with the limit and the usage, and the entry of memory.stat that can be reclaimed."""


def device_for(num_numbers: int) -> torch.device | None:
    """The device for a model with this many elements: a GPU with enough free memory, else the CPU; None: no memory."""
    return _device(int(4 * FREE_TIMES * num_numbers), host_free_bytes(), _gpu_free_bytes())


def _device(needed: int, host_free: int, gpu_free: int | None) -> torch.device | None:
    """Also checks the host's memory for a GPU, since a model is read into it first."""
    if host_free <= needed:
        return None
    return torch.device("cuda" if gpu_free is not None and gpu_free > needed else "cpu")


def _gpu_free_bytes() -> int | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def host_free_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """The free host memory in bytes, within the limits of the process's control groups (its container)."""
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
    """The process's control groups and their parents, as far as they are visible."""
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
    """Whether the error, or one that caused it, is about a lack of GPU or host memory."""
    told = any(text in str(error) for text in ("DefaultCPUAllocator", os.strerror(errno.ENOMEM)))
    return told or isinstance(error, torch.OutOfMemoryError | MemoryError)
