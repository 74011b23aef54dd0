from __future__ import annotations

from functools import partial

import pytest

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError
from raytune_llm.runs.remote_task import call_on_node
from raytune_llm.runs.trained import read_trained
from raytune_llm.session import connect

pytestmark = pytest.mark.ray


def test_a_node_runs_a_partial_function_and_raises_what_it_raises():
    resources = load_config("prepare", ["model=tiny_random", "data.path=rows.jsonl", "resources=local"]).resources
    connect(resources)
    assert call_on_node(resources, partial(divmod, 7, 2)) == (3, 1)
    with pytest.raises(ConfigError, match=r"export\.run must be the output folder of a run"):
        call_on_node(resources, partial(read_trained, "/nothing/there", "export.run"))
