"""The commands, settings, files and headings that README.md, CHANGELOG.md and docs/ name exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raytune_llm.__main__ import VERBS
from raytune_llm.config import command_line
from raytune_llm.config.options import groups as all_groups
from raytune_llm.config.options import options

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


READS_FILES = ("tune resume ", "--config-dir conf ", "--config-dir outputs/")
"""Beginnings of commands that read what an earlier command wrote."""


def commands(page: Path) -> Iterator[str]:
    """What follows `python -m raytune_llm` on the page, in code blocks and in sentences."""
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"-m raytune_llm ([^`\n]+)", text):
        if line not in VERBS and not line.startswith(READS_FILES) and "--help" not in line:
            yield line


@pytest.mark.parametrize("command", sorted({line for page in PAGES for line in commands(page)}))
def test_a_command_of_the_docs_has_settings_that_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    verb = words.pop(0) if words and words[0] in VERBS else "train"
    command_line.load(command_line.parse(verb, words))


def keys_of_sections() -> dict[str, set[str]]:
    """Section -> the settings that it has with any of its options."""
    keys: dict[str, set[str]] = {}
    for file in (ROOT / "conf").rglob("*.yaml"):
        group, values = file.parent.name, yaml.safe_load(file.read_text()) or {}
        for section, held in values.items() if group == "conf" else [(group, values)]:
            if isinstance(held, dict) and group != "experiment":
                keys.setdefault(section, set()).update(held)
    return keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_setting_of_the_docs_exists(page):
    keys = keys_of_sections()
    settings = re.findall(r"`([a-z_]+)\.([a-z_]+)[a-z_.]*(?:=[^`]*)?`", page.read_text())
    files = ("json", "yaml", "md", "py")
    assert [f"{section}.{key}" for section, key in settings if key not in keys.get(section, {key, *files}) | {*files}] == []
    chosen = re.findall(r"`([a-z_]+)=([a-z_0-9]+)`", page.read_text())
    groups = {group: options(group) for group in all_groups()}
    assert [f"{group}={option}" for group, option in chosen if option not in groups.get(group, [option])] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_of_the_docs_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_path_of_the_docs_exists(page):
    folders = "raytune_llm|tests|conf|scripts|benchmarks|docs|cluster|examples"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists() and "NAME" not in path] == []
    benchmarks = re.findall(r"scripts/bench ([a-z]\w*)|-m benchmarks ([a-z]\w*)", page.read_text())
    names = {f"{one or other}.py" for one, other in benchmarks}
    assert names <= {file.name for file in (ROOT / "benchmarks").glob("*.py")}


def test_the_tree_in_the_readme_has_every_folder_and_module():
    tree = (ROOT / "README.md").read_text().split("## Repository layout")[1].split("```")[1]
    package, others = tree.split("\nconf/")
    for folder in (ROOT / "raytune_llm").iterdir():
        if folder.is_dir() and not folder.name.startswith("__"):
            assert f"\n  {folder.name}/" in package, folder
    for module in (ROOT / "raytune_llm").glob("*.py"):
        assert module.name in package or module.name == "__init__.py", module
    for name in re.findall(r"^  (\w+/)|(\w+\.py)", package, re.MULTILINE):
        assert (ROOT / "raytune_llm" / "".join(name)).exists(), name
    for name in re.findall(r"^(\w+)/", f"conf/{others}", re.MULTILINE):
        assert (ROOT / name).is_dir(), name
