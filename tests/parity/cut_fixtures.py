"""Cut the cases in fixtures/ from the full sets: python -m tests.parity.cut_fixtures

A few of each kind, without what no test reads. The full sets are the maintainers' (CONTRIBUTING.md).
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.parity.sets import FULL, KEPT

Case = dict[str, Any]

LOSSES = ("kto", "logprobs", "model_steps", "optim", "preference", "reward", "sft")
KINDS_WITHOUT_A_TEST = {"grpo", "dapo", "gspo"}
WEIGHTS = ("tiny_llama", "tiny_llama_ref", "adapter_dora_s0", "adapter_lora_s0", "adapter_rslora_s0")

WELL_KNOWN = ("chatml", "llama3", "mistral", "qwen3")
"""Templates of which more is kept than of others."""
CONVERSATIONS = (
    "turns3_system/inference",
    "tool_call_system_parallel/multiturn",
    "placeholder_in_content/multiturn",
    "thought_history_and_last/oneturn",
    "thought_history_only/multiturn/think=True/discard",
    "thought_last_only/multiturn/think=True",
    "tool_call/inference/think=True",
)
OVERRIDES = (
    "chatml/tool_format=None/default_system=Override system.",
    "chatml/tool_format=None/default_system=",
    "chatml/tool_format=qwen/default_system=None",
    "llama3/tool_format=nonexistent/default_system=None",
)
LABELS = [
    "sft/single",
    "sft/system",
    "sft/turns3",
    "sft/tools",
    "sft/think_history_only",
    "sft/special_in_content",
    "sft/both_long/cutoff=16",
    "sft/single/cutoff=3",
    "sft/turns4_even_sizes/cutoff=32",
    "sft/turns3/mask_history/cutoff=32",
    "sft/single/train_on_prompt/cutoff=64",
    "sft/single/template=breeze",
    "sft/single/template=qwen3/think=True/mask_history/preserve",
    "sft/think_history_only/template=qwen3/think=False/mask_history",
    "predict/single/template=qwen3/think=False",
    "predict/two_responses",
    "ppo/single",
    "ppo/turns3",
    "rm/single",
    "rm/three_responses",
    "rm/single/template=qwen3/think=True",
    "rm/long_rejected/cutoff=48",
    "kto/batch2",
    "kto/template=breeze",
    "pt/no_packing/add_bos/cutoff=40",
    "pt/auto_packing/cutoff=40",
]
CONVERTERS = [
    "alpaca/prompt_and_query",
    "alpaca/missing_query_key",
    "alpaca/missing_output_key",
    "alpaca/number_output",
    "alpaca/history_2",
    "alpaca/ranking_empty_rejected",
    "alpaca/ranking_list_chosen",
    "alpaca/kto_true",
    "alpaca/kto_true_empty_output",
    "alpaca/images_mixed",
    "sharegpt/basic",
    "sharegpt/system_in_middle",
    "sharegpt/tools",
    "sharegpt/tools_list_value",
    "sharegpt/ranking",
    "sharegpt/kto_int",
    "sharegpt/messages_column_default_dropped",
    "openai/basic",
    "openai/tools_string",
    "openai/tool_calls_text_dropped",
    "openai/parallel_tool_results",
    "openai/trailing_tool_results_ranking",
    "openai/unknown_role",
    "openai/ranking",
    "openai/images",
]


def cut(full: Path, into: Path) -> None:
    for name in LOSSES:
        everything = json.loads((full / "losses" / f"{name}.json").read_text(encoding="utf-8"))
        write(into / "losses" / f"{name}.json", of_first_seed(everything))
    for name in WEIGHTS:
        for file in (full / "losses" / name).iterdir():
            if file.name in ("config.json", "adapter_config.json") or file.suffix == ".safetensors":
                (into / "losses" / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, into / "losses" / name / file.name)
    for name, choose in RECORDED.items():
        lines = (full / "llamafactory" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [without(row, "segments", "attention_mask") for row in choose(list(map(json.loads, lines)))]
        path = into / "llamafactory" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(compact(row) + "\n" for row in rows), encoding="utf-8")


# Values of formulas ---------------------------------------------------------------------------------------------------


def of_first_seed(everything: Case) -> Case:
    """Its cases of every kind, without what libraries gave."""
    cases = [
        without(case, "sources", "agreement")
        for case in everything["cases"]
        if case["seed"] == 0 and case["kind"] not in KINDS_WITHOUT_A_TEST
    ]
    used = {key for case in cases for key in as_list(case.get("input"))}
    inputs = {key: value for key, value in everything.get("inputs", {}).items() if key in used}
    return {"schema": everything["schema"], "inputs": inputs, "cases": cases}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def write(path: Path, oracle: Case) -> None:
    """A line each input and each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = ",\n".join(f"{compact(key)}:{compact(value)}" for key, value in oracle["inputs"].items())
    cases = ",\n".join(map(compact, oracle["cases"]))
    schema = compact(oracle["schema"])
    path.write_text(f'{{"schema":{schema},\n"inputs":{{\n{inputs}}},\n"cases":[\n{cases}]}}\n', encoding="utf-8")


# What LLaMA-Factory gave ----------------------------------------------------------------------------------------------


def by_id(*ids: str) -> Callable[[list[Case]], list[Case]]:
    return lambda rows: [row for row in rows if row["id"] in ids]


def templates(rows: list[Case]) -> list[Case]:
    """Of each a conversation with a system text, and more of the well-known ones."""
    wanted = {f"{name}/{conversation}" for name in WELL_KNOWN for conversation in CONVERSATIONS}
    systems = [row for row in rows if "/single_system/" in row["id"]]
    first = {row["id"] for row in shortest(systems, lambda row: row["template"], 1)}
    return [row for row in rows if row["id"] in first | wanted]


def some_templates(rows: list[Case]) -> list[Case]:
    return [row for number, row in enumerate(rows) if row["id"] in WELL_KNOWN or number % 8 == 0]


def tools(rows: list[Case]) -> list[Case]:
    """Of each format and direction the shortest with something in it."""
    full = [row for row in rows if not isinstance(row["expected"], dict) and row.get("text", " ") != row["expected"]]
    return shortest(full, lambda row: (row["tool_format"], row["direction"], "defect" in row), 1)


def shortest(rows: Iterable[Case], key: Callable[[Case], Any], number: int) -> list[Case]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [row for group in groups.values() for row in sorted(group, key=lambda row: len(compact(row)))[:number]]


RECORDED: dict[str, Callable[[list[Case]], list[Case]]] = {
    "converters": by_id(*CONVERTERS),
    "labels": by_id(*LABELS),
    "loader": lambda rows: [row for row in rows if not row["id"].startswith("interleave")],
    "packing_knapsack": lambda rows: rows[:8],
    "template_exports": some_templates,
    "template_meta": some_templates,
    "template_overrides": by_id(*OVERRIDES),
    "templates": templates,
    "templates_minimal": templates,
    "tools": tools,
    "truncation": lambda rows: rows[::16],
}


def without(value: Any, *names: str) -> Any:
    """Without the entries of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(entry, *names) for key, entry in value.items() if key not in names}
    return [without(entry, *names) for entry in value] if isinstance(value, list) else value


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


if __name__ == "__main__":
    shutil.rmtree(KEPT / "losses", ignore_errors=True)
    shutil.rmtree(KEPT / "llamafactory", ignore_errors=True)
    cut(FULL, KEPT)
