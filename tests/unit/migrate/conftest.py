from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ALPACA = {"instruction": "Say yes.", "input": "", "output": "Yes."}
TURNS = [{"from": "human", "value": "Say yes."}]
SETS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "identity": ({}, [ALPACA]),
    "alpaca_en_demo": ({}, [ALPACA] * 9),
    "c4_demo": ({"columns": {"prompt": "text"}}, [{"text": "Once upon a time."}]),
    "dpo_en_demo": (
        {
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        },
        [{"conversations": TURNS, "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}],
    ),
    "kto_en_demo": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "label"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        [{"messages": [{"role": "user", "content": "Say yes."}, {"role": "assistant", "content": "Yes."}], "label": True}],
    ),
    "mllm_demo": (
        {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}},
        [{"messages": TURNS, "images": ["a.jpg"]}],
    ),
}


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of LLaMA-Factory, with its data/, in which the test runs."""
    (tmp_path / "data").mkdir()
    entries = {}
    for name, (entry, rows) in SETS.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(rows))
        entries[name] = {"file_name": f"{name}.json", **entry}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def training_file(factory: Path) -> Callable[..., Path]:
    """Writes a training file. JSON is YAML."""

    def write(name: str = "mine", /, **arguments: Any) -> Path:
        path = factory / "examples" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(arguments))
        return path

    return write
