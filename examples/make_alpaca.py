"""Makes alpaca.jsonl: the first rows of commands.jsonl in Alpaca's columns.

python examples/make_alpaca.py > examples/alpaca.jsonl
"""

from __future__ import annotations

import json
import sys

import make_commands

NUM_ROWS = 400


def main() -> None:
    for request, command in make_commands.made()[:NUM_ROWS]:
        row = {"system": make_commands.SYSTEM, "instruction": request, "input": "", "output": command}
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
