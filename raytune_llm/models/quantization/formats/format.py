"""The protocol of a checkpoint's format of quantized weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """How a checkpoint's files hold the weight of a linear layer: as several tensors, from which it is computed."""

    PARTS: ClassVar[tuple[str, ...]]
    """Their names, each after the layer's."""
    package: ClassVar[tuple[str, str] | None] = None
    """What computes the weight, and the extra of this project that installs it; None where it is computed here."""

    @classmethod
    def lacks(cls, given: Mapping[str, Any], model_type: str) -> str | None:
        """Why such a checkpoint can't be read, as what it has; None if it can. given: its quantization_config."""
        return None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The format of a checkpoint with this quantization_config."""
        return cls()

    @abstractmethod
    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        """A layer's weight [N, K] in float32. parts: by name; those that a checkpoint may leave out can be missing."""
