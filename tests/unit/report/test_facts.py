from __future__ import annotations

from io import StringIO

from rich.console import Console

from raytune_llm.report.facts import print_facts


def test_names_and_values_stand_in_columns_and_a_path_is_whole_however_long_it_is():
    console, path = Console(width=40, file=StringIO()), f"/outputs/{'a' * 60}/{'b' * 60}"
    print_facts(console, [("model", path), ("steps", "3")])
    assert console.file.getvalue() == f"model  {path}\nsteps  3\n"
