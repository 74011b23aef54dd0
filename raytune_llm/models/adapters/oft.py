"""OFT: block-diagonal rotations of a layer's inputs (Qiu et al. 2023, arXiv 2306.07280; 2025, arXiv 2506.19847).

The inverse in the Cayley transform is approximated by a Neumann series, as in the second paper and PEFT's default.
"""

from __future__ import annotations

from peft import OFTConfig, PeftConfig

from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Kept, Layers, Method, only_linear, sides


def oft(*, block_size: int | None, blocks: int | None, dropout: float) -> OFTConfig:
    """dropout: the fraction of blocks that are not rotated in a pass."""
    return OFTConfig(r=blocks or 0, oft_block_size=block_size or 0, module_dropout=dropout)


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, OFTConfig)


def blocks_fit(layers: Layers, *, block_size: int | None, blocks: int | None, **settings: float) -> None:
    """Raises ConfigError unless the blocks divide each layer's inputs. Blocks must have at least two inputs to rotate."""
    only_linear(layers, "oft")
    setting, part = ("blocks", blocks) if block_size is None else ("block_size", block_size)
    assert part is not None, "one of the two is given"
    for name, layer in layers.items():
        inputs, _ = sides(layer)
        if inputs % part or part == inputs == blocks:
            rule = f"must divide the {inputs} inputs of {name.rpartition('.')[2]}"
            raise ConfigError(f"adapter.{setting}", rule, got=part, fix="Choose another, or set other adapter.targets.")


KEPT = Kept(alone=True, converts=True, drops_inputs=False)
"""PEFT rotates inputs in float32; they are cast back for the products."""
OFT = Method(config=oft, describes=describes, check=blocks_fit, kept=KEPT)
