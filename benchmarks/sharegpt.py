"""10,000 ShareGPT conversations of six messages to tokens: ours beside LLaMA-Factory's, on the same two cores.

    scripts/bench sharegpt --llamafactory /path/to/its/python [--rows 10000] [--messages 6]

Prints JSON: rows/s of both, how many times as fast ours is, and of how many rows ids and labels are the same. Theirs is the
time of `get_dataset` (loading, converting, tokenizing) with two processes; ours the steady rate that the command reports, in one
process and through Ray. `times_whole_command` compares the commands from start to end, imports and Ray's start included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from prepare import SOURCE, run_command, run_llamafactory

from raytune_llm.data.store import Store

MAX_LENGTH = 2048
IGNORE = -100
"""transformers' label of a token that is not trained."""
WHERE = ("inline", "local")
"""One process, and Ray's workers."""


def write_rows(path: Path, num_rows: int, num_messages: int) -> None:
    """Requests and answers of the demo's rows, drawn anew for each conversation."""
    draw = random.Random(0)
    rows = json.loads(SOURCE.read_text())
    with path.open("w") as stream:
        stream.write("[")
        for number in range(num_rows):
            messages = []
            for row in draw.choices(rows, k=num_messages // 2):
                request = "\n".join(filter(None, (row["instruction"], row["input"])))
                messages += [{"from": "human", "value": f"{request} ({number})"}, {"from": "gpt", "value": row["output"]}]
            stream.write(("," if number else "") + "\n" + json.dumps({"conversations": messages}))
        stream.write("\n]\n")


def same_rows(store: Store, theirs: Path) -> int:
    """Rows with the same ids and the same labels."""
    same = 0
    table = pq.read_table(theirs)
    columns = (table[name].to_pylist() for name in ("input_ids", "labels"))
    for number, (their_ids, their_labels) in enumerate(zip(*columns, strict=True)):
        ids, spans, _ = store.row(number)
        labels = np.full(len(ids), IGNORE)
        for start, end in spans.reshape(-1, 2).tolist():
            labels[start:end] = ids[start:end]
        same += ids.tolist() == their_ids and labels.tolist() == their_labels
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--messages", type=int, default=6)
    parser.add_argument("--llamafactory", required=True, help="the Python that has LLaMA-Factory 0.9.5")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.json", asked.rows, asked.messages)
        settings = ["data=sharegpt", "data.template=smollm2", f"data.max_length={MAX_LENGTH}"]
        ours = {where: run_command(folder / "rows.json", folder / where, where, *settings) for where in WHERE}
        theirs = run_llamafactory(asked.llamafactory, folder / "rows.json", folder, formatting="sharegpt")
        stores = [Store.open(manifest.parent) for where in WHERE for manifest in folder.glob(f"{where}/*/manifest.json")]
        same = min(same_rows(store, folder / "theirs.parquet") for store in stores)
    result = {
        "rows": asked.rows,
        "messages": asked.messages,
        "cores": len(cores),
        **ours,
        "llamafactory": theirs,
        "times": {where: round(found["rows_per_s"] / theirs["rows_per_s"], 2) for where, found in ours.items()},
        "times_whole_command": {where: round(theirs["wall_s"] / found["wall_s"], 2) for where, found in ours.items()},
        "rows_with_same_ids_and_labels": same,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
