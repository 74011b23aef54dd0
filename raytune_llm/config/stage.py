from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import section


@section
class SFT:
    """Supervised fine-tuning: cross-entropy over the trained tokens."""

    name: Literal["sft"]


StageConfig = SFT
