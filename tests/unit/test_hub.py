from __future__ import annotations

import time

from huggingface_hub import constants

from raytune_llm import hub


def test_offline_mode_asks_no_hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    began = time.perf_counter()
    assert hub.ask_hub()[1] == "offline"
    assert time.perf_counter() - began < 1


def test_an_address_that_nobody_answers_is_not_reached():
    assert not hub.answers("http://127.0.0.1:9")
