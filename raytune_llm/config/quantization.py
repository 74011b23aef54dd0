from __future__ import annotations

from typing import Literal

from raytune_llm.config.section import section


@section
class NoQuantization:
    name: Literal["none"]


QuantizationConfig = NoQuantization
