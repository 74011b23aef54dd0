from __future__ import annotations

import pytest

from raytune_llm import load_config
from raytune_llm.config.parts import parts_of, run_of
from raytune_llm.errors import ConfigError

LINES = [
    [],
    ["model=tiny_random", "serve.adapters={a: outputs/a}", "serve.replicas=[1,4]", "resources=cluster"],
    ["model=hub", "model.path=org/name", "model.config.rope_theta=1e6", "quantization=bnb_nf4", "engine.max_rows=7"],
]


@pytest.mark.parametrize("overrides", LINES)
def test_a_run_comes_back_from_its_parts(overrides: list[str]):
    run = load_config("serve", overrides)
    assert run_of("serve", parts_of("serve", run)) == run


def test_parts_hold_what_differs_and_what_was_chosen():
    run = load_config("serve", ["model=hub", "model.path=org/name", "serve.port=80"])
    assert parts_of("serve", run) == {
        "model": {"path": "org/name"},
        "serve": {"port": 80},
        "engine": {"name": "native"},
        "quantization": {"name": "none"},
        "resources": {"name": "inline"},
    }


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"serve\.prot"):
        run_of("serve", {"model": {"path": "org/name"}, "serve": {"prot": 80}})
