"""Makes verdicts.jsonl: requests as in pairs.jsonl with one answer each, and whether it is a good one.

    python examples/make_verdicts.py > examples/verdicts.jsonl

Half of the answers are good. No request is one of commands.jsonl or pairs.jsonl.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from random import Random

import make_pairs
from make_commands import SYSTEM

NUM_ROWS = 600
SEED = 13


def main() -> None:
    rng = Random(SEED)
    others = make_pairs.requests_of_commands() | {case.request for case in make_pairs.made()}
    cases = list(islice(make_pairs.cases(rng, others), NUM_ROWS))
    labels = [number % 2 == 0 for number in range(NUM_ROWS)]
    rng.shuffle(cases)
    rng.shuffle(labels)
    for case, good in zip(cases, labels, strict=True):
        turns = (("system", SYSTEM), ("user", case.request), ("assistant", case.better if good else case.worse))
        row = {"messages": [{"role": role, "content": content} for role, content in turns], "label": good}
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
