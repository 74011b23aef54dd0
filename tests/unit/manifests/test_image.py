from __future__ import annotations

import re
from pathlib import Path

import pytest

from raytune_llm.object_store import EXTRAS

IMAGE = (Path(__file__).parents[3] / "cluster/Dockerfile").read_text()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_has_what_a_job_of_a_cluster_may_ask_for(target: str):
    (packages,) = re.findall(rf"^FROM base AS {target}-packages\n(.+?)^FROM", IMAGE, re.MULTILINE | re.DOTALL)
    extras = set(re.findall(r"--extra (\w+)", packages))
    assert extras >= {"serve", "tune", *EXTRAS.values()}
