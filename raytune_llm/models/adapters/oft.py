"""OFT: block-diagonal rotations of a layer's inputs (Qiu et al. 2023, arXiv 2306.07280; 2025, arXiv 2506.19847).

The inverse in the Cayley transform is approximated by a Neumann series, as in the second paper and PEFT's default.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from peft import OFTConfig, PeftConfig
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from raytune_llm.config.adapter import OFT as OFTSection
from raytune_llm.config.adapter import Layered
from raytune_llm.errors import ConfigError
from raytune_llm.models.adapters.method import Kept, Layers, Method, only_linear, sides

FOUR_AXES = "kv_b_proj"
"""The layer that makes keys and values from latent ones (DeepSeek's attention). It is given [B, 1, T, K]."""


def oft(*, block_size: int | None, blocks: int | None, dropout: float) -> OFTConfig:
    """dropout: the fraction of blocks that are not rotated in a pass."""
    return OFTConfig(r=blocks or 0, oft_block_size=block_size or 0, module_dropout=dropout)


def describes(saved: PeftConfig) -> bool:
    return isinstance(saved, OFTConfig)


def blocks_fit(layers: Layers, *, block_size: int | None, blocks: int | None, **settings: float) -> None:
    """Raises ConfigError unless the blocks divide each layer's inputs. Blocks must have at least two inputs to rotate."""
    only_linear(layers, "oft")
    if other := sorted(name for name, layer in layers.items() if isinstance(layer, Conv1D)):
        rule = f"can't be oft for layers of the class Conv1D, as {other[0]} is: PEFT's OFT has none for them"
        raise ConfigError("adapter", rule, got="oft", fix="Set adapter=lora.")
    if latent := sorted(name for name in layers if name.endswith(FOUR_AXES)):
        rule = f"can't be oft for {latent[0]}: its inputs have four axes, which PEFT's OFT takes for those of a convolution"
        raise ConfigError("adapter", rule, got="oft", fix="Set adapter=lora, or other adapter.targets.")
    setting, part = ("blocks", blocks) if block_size is None else ("block_size", block_size)
    assert part is not None, "one of the two is given"
    for name, layer in layers.items():
        inputs, _ = sides(layer)
        if inputs % part or part == inputs == blocks:
            rule = f"must divide the {inputs} inputs of {name.rpartition('.')[2]}"
            raise ConfigError(f"adapter.{setting}", rule, got=part, fix="Choose another, or set other adapter.targets.")


def continues(saved: PeftConfig, section: Layered) -> None:
    """Take the section's dropout."""
    assert isinstance(saved, OFTConfig) and isinstance(section, OFTSection)
    saved.module_dropout = section.dropout


class Rotation(OFTRotationModule):
    """PEFT's rotation with the dropout of its config, which PEFT 0.21 does not apply: in training, random blocks rotate nothing
    (multiplicative dropout; Qiu et al. 2023, section 4)."""

    dropout: float

    @classmethod
    def instead_of(cls, rotation: OFTRotationModule, dropout: float) -> Self:
        made = cls.__new__(cls)
        vars(made).update(vars(rotation))
        made.dropout = dropout
        return made

    def _cayley_batch(self, Q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Q: [blocks, entries above the diagonal]. The rotation of entries that are 0 is the identity."""
        if self.training:
            Q = Q * (torch.rand(len(Q), 1, device=Q.device) >= self.dropout)
        return super()._cayley_batch(Q, *args, **kwargs)


def put_dropout(model: nn.Module, key: str) -> None:
    for layer in model.modules():
        if isinstance(layer, OFTLayer) and key in layer.oft_R and (dropout := getattr(layer.oft_dropout[key], "p", 0.0)):
            rotation = layer.oft_R[key]
            assert isinstance(rotation, OFTRotationModule)
            layer.oft_R[key] = Rotation.instead_of(rotation, dropout)


KEPT = Kept(alone=True, converts=True, drops_inputs=False)
"""PEFT rotates inputs in float32; they are cast back for the products."""
OFT = Method(config=oft, describes=describes, check=blocks_fit, continues=continues, placed=put_dropout, kept=KEPT)
