from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from raytune_llm import api, load_config
from raytune_llm.errors import ConfigError
from raytune_llm.serve.adapters import checked_folder, checked_name


@pytest.mark.parametrize("name", ["sft_qwen", "run-1.5", "a@20", "A"])
def test_plain_names_are_taken(name: str):
    assert checked_name(name, "base") == name


@pytest.mark.parametrize("name", ["", ".x", "../x", "a/b", "a b", "a\n", "a..b", "é", "x" * 129, "base"])
def test_other_names_are_refused(name: str):
    with pytest.raises(ConfigError, match="an adapter's name must"):
        checked_name(name, "base")


@pytest.mark.parametrize("name", ["a/b", "a b", ".x", "a..b", "é", "x" * 129, "a@2"])
def test_other_names_are_refused_in_settings(name: str):
    with pytest.raises(ConfigError, match=r"serve\.adapters must hold"):
        replace(load_config("serve", ["model=tiny_random"]).serve, adapters={name: "x"})


def test_the_base_s_name_is_refused_before_anything_is_loaded(tmp_path: Path):
    folder = tmp_path / "base"
    folder.mkdir()
    run = load_config("serve", ["model=hub", f"model.path={folder}", "serve.port=0", "serve.adapters={base: x}"])
    with pytest.raises(ConfigError, match=r"serve\.adapters must not hold the base's name"):
        api.serve(run)
    on_ray = load_config("serve", ["model=hub", f"model.path={folder}", "resources=local", "serve.adapters={base: x}"])
    with pytest.raises(ConfigError, match=r"serve\.adapters must not hold the base's name"):
        api.serve(on_ray)


def test_a_file_in_place_of_a_folder_and_a_circle_of_links_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/circle").symlink_to(tmp_path / "loop/circle")
    with pytest.raises(ConfigError, match="must be a folder that can be read"):
        checked_folder(str(tmp_path / "file"), [tmp_path])
    with pytest.raises(ConfigError, match="an adapter's folder must"):
        checked_folder(str(tmp_path / "loop"), [tmp_path])


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path):
    """Whoever reads it would wait for its writer."""
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a/adapter_config.json")
    with pytest.raises(ConfigError, match=r"must hold files alone, and adapter_config\.json is none"):
        checked_folder(str(tmp_path / "a"), [tmp_path])


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
