"""Which models are asked by which name, and on which engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from raytune_llm.config.load import load_config
from raytune_llm.config.plain import to_yaml
from raytune_llm.errors import ConfigError
from raytune_llm.evaluate.models import groups_of, written_alike
from tests.models import saved_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("models") / "tiny")


def adapter_of(base: Path, folder: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    return folder


def finished_run(base: Path, folder: Path, *settings: str) -> str:
    """As a run of LoRA leaves it, as far as it is read."""
    folder.mkdir()
    words = [f"model.path={base}", f"name={folder.name}", f"output_dir={folder}", "data=chat", "data.path=rows.jsonl", *settings]
    (folder / "run.yaml").write_text(to_yaml(load_config("train", ["model=hub", "adapter=lora", *words])))
    adapter_of(base, folder / "final")
    return str(folder)


def groups(*settings: str, models: list[str]) -> list[Any]:
    given = ", ".join(f"'{one}'" for one in models)
    words = [f"evaluate.models=[{given}]", "evaluate.tasks=[mmlu_test]", "evaluate.data=there", "output_dir=out"]
    return groups_of(load_config("evaluate", [*words, *settings]))


def names(found: list[Any]) -> list[str]:
    return [name for group in found for name, _ in group.names]


def test_a_base_that_is_called_as_a_run_gets_another_name(base, tmp_path):
    run = finished_run(base, tmp_path / "tiny")
    assert names(groups("evaluate.base=true", models=[run])) == ["tiny of tiny", "tiny"]


def test_two_bases_whose_folders_are_called_alike_get_names_of_their_own(base, tmp_path):
    other = saved_llama(tmp_path / "tiny")
    models = [finished_run(base, tmp_path / "a"), finished_run(other, tmp_path / "b")]
    assert names(groups("evaluate.base=true", models=models)) == ["tiny of a", "a", "tiny of b", "b"]


def test_a_base_that_is_asked_in_two_templates_has_two_names(base, tmp_path):
    models = [finished_run(base, tmp_path / "a"), finished_run(base, tmp_path / "b", "data.default_system=other")]
    found = groups("evaluate.base=true", models=models)
    assert names(found) == ["tiny of a", "a", "tiny of b", "b"] and len(found) == 2


@pytest.mark.parametrize(
    "setting",
    [
        "template=llama3",
        "default_system=x",
        "tool_format=qwen",
        "today=1 Jan 2025",
        "enable_thinking=false",
        "preserve_thinking=true",
    ],
)
def test_runs_that_render_otherwise_do_not_share_a_group(setting):
    words = ["model=_base", "model.path=none", "data.path=none", "data.template=chatml"]
    one, other = (load_config("prepare", [*words, *more]).data for more in ([], [f"data.{setting}"]))
    assert written_alike(one, one) and not written_alike(one, other)


def test_runs_models_and_adapters_stand_side_by_side(base, tmp_path):
    run, adapter = finished_run(base, tmp_path / "run"), adapter_of(base, tmp_path / "lora")
    model = saved_llama(tmp_path / "exported" / "run")
    found = groups(models=[run, str(adapter), str(model)])
    assert names(found) == ["run", "lora", "run in exported"]
    assert [Path(group.model.path) for group in found] == [base, model]  # both adapters are on one engine
    assert found[0].adapters == {"run": f"{run}/final", "lora": str(adapter)}


def test_runs_of_one_name_are_told_apart_by_their_folders_and_none_is_asked_twice(base, tmp_path):
    one, other = (finished_run(base, tmp_path / place, "name=run") for place in ("one", "other"))
    assert names(groups(models=[one, other])) == ["run", "run in other"]
    with pytest.raises(ConfigError, match=r"evaluate\.models must hold each model once: this is run, too"):
        groups(models=[one, f"{one}/final"])


def test_the_base_of_an_adapter_may_be_given_and_of_nothing_else(base, tmp_path):
    other, adapter = saved_llama(tmp_path / "other"), adapter_of(base, tmp_path / "lora")
    (one,) = groups(f"model.path={other}", "evaluate.base=true", models=[str(adapter)])
    assert one.model.path == str(other) and names([one]) == ["other", "lora"]
    with pytest.raises(ConfigError, match=r"^model\.path is the base of adapters in evaluate\.models .* and there is none"):
        groups(f"model.path={other}", models=[finished_run(base, tmp_path / "run")])


def test_what_is_no_model_is_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=r"evaluate\.models must hold output folders of runs, folders with a model"):
            groups(models=[str(place)])
    models = [saved_llama(tmp_path / place / "models" / "tiny") for place in ("one", "two", "three")]
    with pytest.raises(ConfigError, match="different names: tiny in models comes twice"):
        groups(models=[str(model) for model in models])
