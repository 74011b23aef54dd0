from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
FP32, BF16 = 4, 2
MATRICES = "it needs matrices, and ZeRO flattens them"


class TrainedShape(NamedTuple):
    """The shape of a trained tensor, which memory is counted with."""

    shape: tuple[int, ...]
    layer: int | None
    """The number of the repeated layer that it is in; null: embedding, head or last norm."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_layer_matrix(self) -> bool:
        """Or those of its experts in one tensor [E, N, K]."""
        return self.layer is not None and (len(self.shape) == 2 or (len(self.shape) == 3 and self.shape[1] > 1))


class StateBytes(NamedTuple):
    like_weights: int
    """Bytes of tensors of the weights' shapes, which are sharded as the weights are."""
    whole: int = 0
    """Bytes of tensors of other shapes, which every worker holds whole."""


def bytes_per_value(trained: Iterable[TrainedShape], size: int) -> StateBytes:
    return StateBytes(size * sum(one.numel for one in trained))


@section
class Group:
    """What differs for some parameters. An entry has no YAML of its own, so what it leaves out is as elsewhere."""

    lr_factor: PositiveFloat = 1.0
    """Their learning rate over lr."""
    weight_decay: NonNegativeFloat | None = None
    """null: as for the others."""


@section
class Steps:
    """Settings of all optimizers."""

    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    groups: dict[str, Group]
    """Regular expression -> what differs for the parameters in whose names it is found; the first that is found holds."""
    layerwise: bool
    """Each tensor steps as its gradient is complete in the backward pass, and the gradient is freed: memory for all of them is
    not needed. Steps are those of false, without clipping."""

    needs_whole: ClassVar[str | None] = None
    """Why it can't step on the flat parts of ZeRO; None where it can."""
    refuses_layerwise: ClassVar[str | None] = None
    """Why tensors can't step one by one; None where they can."""
    refuses_shards: ClassVar[str | None] = None
    """Why it can't keep its state in shards; None where it can."""
    trains_outside: ClassVar[bool] = True
    """Whether it steps on what is in no layer: embedding, head and last norm."""
    schedules: ClassVar[frozenset[str] | None] = None
    """Schedules that it can follow; None: any."""


@section
class Adam(Steps):
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        """The size of the optimizer's state for these tensors, without its step counters."""
        return bytes_per_value(trained, 2 * FP32)


@section
class AdamW(Adam):
    """Loshchilov & Hutter 2017. Weight decay skips vectors (norms and biases)."""

    name: Literal["adamw"]


@section
class AdamWBF16(Adam):
    """AdamW with its moments in bf16, rounded up or down by chance so that small steps are not lost (Zamirai et al. 2020, arXiv
    2010.06192): half of AdamW's state."""

    name: Literal["adamw_bf16"]

    needs_whole: ClassVar[str | None] = "DeepSpeed reads state as float32"

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        return bytes_per_value(trained, 2 * BF16)


@section
class AdamW8bit(Adam):
    """AdamW with its moments in 8 bits, by blocks of 256 values (Dettmers et al. 2021, arXiv 2110.02861). Needs bitsandbytes."""

    name: Literal["adamw_8bit"]
    paged: bool
    """The state is in unified memory, which the GPU's driver moves to the host when the GPU is full. GPUs only."""

    SMALL: ClassVar[int] = 4096
    """Tensors of fewer values keep float32 moments: 8 bits would save nothing there."""
    BLOCK: ClassVar[int] = 256
    needs_whole: ClassVar[str | None] = "its blocks of 8-bit values are of whole tensors, and ZeRO flattens them"

    @property
    def refuses_shards(self) -> str | None:  # type: ignore[override]
        return "shards lie on the GPU, and its pages do not" if self.paged else None

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        every = list(trained)
        small = sum(one.numel for one in every if one.numel < self.SMALL)
        large = [one.numel for one in every if one.numel >= self.SMALL]
        blocks = sum(-(-numel // self.BLOCK) for numel in large)
        return StateBytes(2 * (FP32 * small + sum(large)), 2 * FP32 * blocks)


@section
class AdamMini(Adam):
    """AdamW with one second moment a block of weights: a head of queries or keys, a row of any other matrix, a vector (Zhang et
    al. 2024, arXiv 2406.16793)."""

    name: Literal["adam_mini"]

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        """Counted as if each row of queries and keys were a block of its own."""
        every = list(trained)
        return StateBytes(FP32 * sum(one.numel for one in every), FP32 * sum(prod(one.shape[:-1]) for one in every))


@section
class LowRankAdam(Adam):
    """What optimizers share that keep Adam's moments of a layer's matrices (of a mixture, each expert's) in fewer dimensions.
    Other weights have AdamW."""

    rank: PositiveInt
    """The rank of the projected gradient; of smaller matrices their shorter side."""
    update_every: PositiveInt
    """Steps between new projections."""
    scale: PositiveFloat

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        every = [(one, shape) for one in trained for shape in (self.kept(one.shape) if one.is_layer_matrix else 2 * [one.shape])]
        whole = [prod(shape) for one, shape in every if shape != one.shape]
        return StateBytes(FP32 * sum(one.numel for one, shape in every if shape == one.shape), FP32 * sum(whole))

    def kept(self, matrix: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of what is kept of a layer's matrix, or of those of its experts: projected moments, the rank in place of the
        shorter side."""
        *experts, rows, columns = matrix
        rank = min(self.rank, rows, columns)
        return 2 * [(*experts, rows, rank) if rows >= columns else (*experts, rank, columns)]


@section
class GaLore(LowRankAdam):
    """Adam in the gradient's largest singular directions (Zhao et al. 2024, arXiv 2403.03507); scale multiplies its steps."""

    name: Literal["galore"]

    def kept(self, matrix: tuple[int, ...]) -> list[tuple[int, ...]]:
        *experts, rows, columns = matrix
        shorter = min(rows, columns)
        return [*super().kept(matrix), (*experts, shorter, min(self.rank, shorter))]


@section
class Apollo(LowRankAdam):
    """Gradient descent whose step sizes are those that Adam has on a random projection of the gradient (Zhu et al. 2024, arXiv
    2412.05270); the square root of scale multiplies its steps. With rank 1 and one size a tensor it is APOLLO-Mini."""

    name: Literal["apollo"]
    sizes: Literal["channel", "tensor"]
    """One step size a row or column (along the longer side), or one a matrix."""


@section
class BAdam(Adam):
    """AdamW on one layer at a time, which alone has moments, until the next one's turn (Luo et al. 2024, arXiv 2404.02827).
    Gradients of all are computed."""

    name: Literal["badam"]
    switch_every: PositiveInt
    """Steps of a layer's turn."""
    order: Literal["ascending", "descending", "random"]
    outside_layers: bool
    """What is in no layer (embedding, head, last norm) has turns too, as one more block; else it is not trained."""

    @property
    def trains_outside(self) -> bool:  # type: ignore[override]
        return self.outside_layers

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        blocks: dict[int | None, int] = {}
        for one in trained:
            if one.layer is not None or self.outside_layers:
                blocks[one.layer] = blocks.get(one.layer, 0) + one.numel
        return StateBytes(2 * FP32 * max(blocks.values(), default=0))

    needs_whole: ClassVar[str | None] = "it steps on one layer at a time, and ZeRO flattens them into one tensor"
    refuses_layerwise: ClassVar[str | None] = "it counts the steps of all tensors together"


@section
class ScheduleFree(Adam):
    """AdamW whose average of all steps takes the place of a schedule that falls (Defazio et al. 2024, arXiv 2405.15682): the
    gradient is taken near the average, which is evaluated and saved."""

    name: Literal["schedule_free"]

    needs_whole: ClassVar[str | None] = "DeepSpeed's copies of weights would keep what is trained where the average is due"
    schedules: ClassVar[frozenset[str] | None] = frozenset({"constant"})

    def __post_init__(self) -> None:
        if self.beta1 == 0:
            rule = "must be above 0: at 0 the gradient is not taken near the average, which could not be told from it"
            raise ConfigError("optimizer.beta1", rule, got=self.beta1, fix="Leave it out (0.9), or set optimizer=adamw.")


@section
class Adafactor(Steps):
    """Second moments by row and column, and no first (Shazeer & Stern 2018, arXiv 1804.04235). The learning rate is that of the
    schedule, not one of the step's number."""

    name: Literal["adafactor"]
    beta2_decay: PositiveFloat
    """The second moment of step t forgets by 1 - t^-beta2_decay."""
    eps: PositiveFloat
    """Added to squared gradients."""
    clip_threshold: PositiveFloat
    """The root mean square that a tensor's step is clipped to, before the learning rate."""
    relative_to_weights: bool
    """Steps are times the root mean square of the weight, at least 0.001."""

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        every = list(trained)
        vectors = sum(one.numel for one in every if len(one.shape) < 2)
        matrices = [one.shape for one in every if len(one.shape) >= 2]
        sums = sum(prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] for shape in matrices)
        return StateBytes(FP32 * vectors, FP32 * sums)


@section
class Lion(Steps):
    """Steps along the sign of a momentum (Chen et al. 2023, arXiv 2302.06675): half of AdamW's state. Its rate should be a third
    to a tenth of AdamW's, its decay as much larger."""

    name: Literal["lion"]
    beta1: Beta
    """The weight of the momentum in the step."""
    beta2: Beta
    """The decay of the momentum that is kept."""

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        return bytes_per_value(trained, FP32)


@section
class Muon(Adam):
    """Steps along the orthogonalized momentum of a matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as large as
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so that rates and decay carry over from it. Muon takes the matrices of layers,
    of a mixture each expert's. AdamW trains the rest: embeddings, heads, norms and biases."""

    name: Literal["muon"]
    momentum: Beta
    nesterov: bool
    adamw_lr_factor: PositiveFloat
    """AdamW's learning rate over lr."""
    adamw_moments: Literal["float32", "bfloat16"]
    """The type of AdamW's moments; bfloat16 as adamw_bf16 keeps them."""

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        each = {"float32": 2 * FP32, "bfloat16": 2 * BF16}[self.adamw_moments]
        return StateBytes(sum((FP32 if one.is_layer_matrix else each) * one.numel for one in trained))


@section
class SGD(Steps):
    """Gradient descent with momentum (Sutskever et al. 2013). Weight decay is added to the gradient, and skips vectors."""

    name: Literal["sgd"]
    momentum: Beta
    nesterov: bool

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "optimizer.nesterov", "needs a momentum", got=True, fix="Set optimizer.momentum (say 0.9), or nesterov=false."
            )

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        return bytes_per_value(trained, FP32 if self.momentum else 0)


OptimizerConfig = Annotated[
    AdamW | AdamWBF16 | AdamW8bit | AdamMini | Adafactor | Apollo | BAdam | GaLore | Lion | Muon | ScheduleFree | SGD,
    Field(discriminator="name"),
]
