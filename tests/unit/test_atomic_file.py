from __future__ import annotations

from pathlib import Path

import pytest

from raytune_llm.atomic_file import write_atomically


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path):
    file = tmp_path / "chat.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "new \ud800")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_private_file_behind_a_link_stays_private(tmp_path: Path):
    file, link = tmp_path / "chat.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o600)
    link.symlink_to(file)
    write_atomically(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o600


def test_a_device_is_written_to_and_stays():
    write_atomically(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
