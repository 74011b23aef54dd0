"""How much of a disk is free, and which errors mean that nothing is."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errno of a full disk, of a quota, and of a limit on a file's size."""


def free_bytes(folder: Path) -> int:
    """The free bytes of the disk that holds the folder, or would hold it if it existed."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
