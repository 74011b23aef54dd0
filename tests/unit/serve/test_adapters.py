from __future__ import annotations

from pathlib import Path

import pytest

from raytune_llm.errors import ConfigError
from raytune_llm.serve.adapters import checked_folder, checked_name


@pytest.mark.parametrize("name", ["sft_qwen", "run-1.5", "a@20", "A"])
def test_plain_names_are_taken(name: str):
    assert checked_name(name, "base") == name


@pytest.mark.parametrize("name", ["", ".x", "../x", "a/b", "a b", "a\n", "a..b", "é", "x" * 129, "base"])
def test_other_names_are_refused(name: str):
    with pytest.raises(ConfigError, match="an adapter's name must"):
        checked_name(name, "base")


def test_a_folder_in_a_root_is_taken_by_its_real_place(tmp_path: Path):
    (tmp_path / "root/a").mkdir(parents=True)
    assert checked_folder(str(tmp_path / "root/../root/a"), [tmp_path / "root"]) == tmp_path / "root/a"


def test_links_do_not_lead_out(tmp_path: Path):
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("x")
    (tmp_path / "root/link").symlink_to(tmp_path / "secret")
    (tmp_path / "root/a/file").symlink_to(tmp_path / "secret/file")
    for folder in ("root/link", "root/a", "secret", "root/nothing"):
        with pytest.raises(ConfigError, match="an adapter's folder must"):
            checked_folder(str(tmp_path / folder), [tmp_path / "root"])
