"""Small conversations for benchmarks of what costs the same whatever the data."""

from __future__ import annotations

import json
from pathlib import Path


def write_sums(path: Path, number: int = 200) -> None:
    """So many conversations of a question and its answer, as JSON lines."""
    talks = ([("user", f"What is {n} and {n}?"), ("assistant", f"{2 * n}.")] for n in range(number))
    rows = ({"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
