from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from raytune_llm.config.expressions import check_expressions
from raytune_llm.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]
FP32, BF16 = 4, 2
GRADIENTS_AT_ONCE = 3
"""The maximum with optimizer.layerwise: one that is being computed, and on a GPU those whose steps are delayed."""
MATRICES = "it needs matrices, and ZeRO flattens them"


class TrainedShape(NamedTuple):
    """The shape and place of a trained tensor, for estimates of memory."""

    shape: tuple[int, ...]
    layer: int | None
    """The number of the layer that it is in; None: it is in no layer (embedding, head, last norm)."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is a matrix in a layer, or the matrices of its experts in one tensor [E, N, K]."""
        return self.layer is not None and (len(self.shape) == 2 or (len(self.shape) == 3 and self.shape[1] > 1))


class StateBytes(NamedTuple):
    like_weights: int
    """Bytes of state tensors that have the weights' shapes and are sharded like them."""
    whole: int = 0
    """Bytes of state tensors of other shapes, which every worker holds in full."""


def bytes_per_value(trained: Iterable[TrainedShape], size: int) -> StateBytes:
    return StateBytes(size * sum(one.numel for one in trained))


@section
class Group:
    """Settings of a parameter group. They have defaults here, because groups have no YAML file."""

    lr_factor: PositiveFloat = 1.0
    """The group's learning rate as a multiple of optimizer.lr."""
    weight_decay: NonNegativeFloat | None = None
    """The group's weight decay; null: optimizer.weight_decay."""


@section
class Steps:
    """Settings of all optimizers."""

    lr: PositiveFloat
    weight_decay: NonNegativeFloat
    groups: dict[str, Group]
    """Regular expression -> settings of the parameters whose names it matches somewhere. The first match counts."""
    layerwise: bool
    """Step on each tensor as soon as the backward pass has computed its gradient, and free the gradient, so that memory never
    holds all gradients. The result is the same as with false and without clipping."""

    def __post_init__(self) -> None:
        check_expressions("optimizer.groups", self.groups)

    needs_whole: ClassVar[str | None] = None
    """The reason why it can't step on the flattened partitions of ZeRO; None if it can."""
    refuses_layerwise: ClassVar[str | None] = None
    """The reason why it can't step on tensors one by one; None if it can."""
    refuses_shards: ClassVar[str | None] = None
    """The reason why its state can't be sharded; None if it can."""
    trains_outside: ClassVar[bool] = True
    """It also trains parameters outside the layers: embedding, head and last norm."""
    schedules: ClassVar[frozenset[str] | None] = None
    """The schedules that it can be combined with; None: all."""


@section
class Adam(Steps):
    beta1: Beta
    beta2: Beta
    eps: PositiveFloat

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        """The size of the optimizer's state for these tensors. Step counters are not included."""
        return bytes_per_value(trained, 2 * FP32)


@section
class AdamW(Adam):
    """Loshchilov & Hutter 2017. Weight decay skips vectors (norms and biases)."""

    name: Literal["adamw"]


@section
class AdamWBF16(Adam):
    """AdamW with bf16 moments, which halve its state. Stochastic rounding keeps small changes (Zamirai et al. 2020, arXiv
    2010.06192)."""

    name: Literal["adamw_bf16"]

    needs_whole: ClassVar[str | None] = "DeepSpeed reads state as float32"

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        return bytes_per_value(trained, 2 * BF16)


@section
class AdamW8bit(Adam):
    """AdamW with 8-bit moments, quantized in blocks of 256 values (Dettmers et al. 2021, arXiv 2110.02861). It needs
    bitsandbytes."""

    name: Literal["adamw_8bit"]
    paged: bool
    """Keep the state in unified memory, which the GPU's driver moves to the host when the GPU is full. GPUs only."""

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
    """AdamW with one second moment per block of weights (Zhang et al. 2024, arXiv 2406.16793). A block is a head of queries or
    keys, a row of any other matrix, or a vector."""

    name: Literal["adam_mini"]

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        """An upper bound: it counts each row of queries and keys as a block."""
        every = list(trained)
        return StateBytes(FP32 * sum(one.numel for one in every), FP32 * sum(prod(one.shape[:-1]) for one in every))


@section
class LowRankAdam(Adam):
    """Settings of optimizers that keep Adam's moments of a layer's matrices (or each expert's) in a low-rank projection. Other
    weights are trained by AdamW."""

    rank: PositiveInt
    """The rank of the projection; for smaller matrices, the length of their shorter side."""
    update_every: PositiveInt
    """Number of steps between updates of the projection."""
    scale: PositiveFloat

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        every = [(one, shape) for one in trained for shape in (self.kept(one.shape) if one.is_layer_matrix else 2 * [one.shape])]
        whole = [prod(shape) for one, shape in every if shape != one.shape]
        return StateBytes(FP32 * sum(one.numel for one, shape in every if shape == one.shape), FP32 * sum(whole))

    def kept(self, matrix: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shapes of the state for a layer's matrix, or for its experts' matrices: moments whose shorter side is the rank."""
        *experts, rows, columns = matrix
        rank = min(self.rank, rows, columns)
        return 2 * [(*experts, rows, rank) if rows >= columns else (*experts, rank, columns)]


@section
class GaLore(LowRankAdam):
    """GaLore: Adam on the gradient's projection to its largest singular directions (Zhao et al. 2024, arXiv 2403.03507). `scale`
    multiplies its steps."""

    name: Literal["galore"]

    def kept(self, matrix: tuple[int, ...]) -> list[tuple[int, ...]]:
        *experts, rows, columns = matrix
        shorter = min(rows, columns)
        return [*super().kept(matrix), (*experts, shorter, min(self.rank, shorter))]


@section
class Apollo(LowRankAdam):
    """APOLLO: gradient descent with step sizes that Adam would take on a random projection of the gradient (Zhu et al. 2024,
    arXiv 2412.05270). sqrt(scale) multiplies its steps. With rank 1 and one step size per tensor, it is APOLLO-Mini."""

    name: Literal["apollo"]
    sizes: Literal["channel", "tensor"]
    """One step size per row or column (along the longer side), or one per matrix."""


@section
class BAdam(Adam):
    """BAdam: AdamW trains one layer at a time, and only that layer has moments (Luo et al. 2024, arXiv 2404.02827). Gradients of
    all layers are computed."""

    name: Literal["badam"]
    switch_every: PositiveInt
    """The number of steps before the next layer's turn."""
    order: Literal["ascending", "descending", "random"]
    outside_layers: bool
    """Parameters outside the layers (embedding, head, last norm) are trained too, as one more block that takes its turn."""

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
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average of all iterates replaces the decay of the learning
    rate. Gradients are computed near the average, and the average is evaluated and saved."""

    name: Literal["schedule_free"]

    needs_whole: ClassVar[str | None] = "DeepSpeed's copies of weights would keep what is trained where the average is due"
    schedules: ClassVar[frozenset[str] | None] = frozenset({"constant"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta1 == 0:
            rule = "must be above 0: at 0 the average can't be recovered from the trained weights"
            raise ConfigError("optimizer.beta1", rule, got=self.beta1, fix="Leave it out (0.9), or set optimizer=adamw.")


@section
class Adafactor(Steps):
    """Second moments by row and column, and no first moments (Shazeer & Stern 2018, arXiv 1804.04235). The learning rate comes
    from the schedule; Adafactor's own rate, which depends on the step number, is not used."""

    name: Literal["adafactor"]
    beta2_decay: PositiveFloat
    """The decay of the second moments at step t is 1 - t^-beta2_decay."""
    eps: PositiveFloat
    """This is added to squared gradients."""
    clip_threshold: PositiveFloat
    """Maximum root mean square of a tensor's step, before it is multiplied by the learning rate."""
    relative_to_weights: bool
    """Multiply steps by the root mean square of the weight, or by 0.001 if that is larger."""

    needs_whole: ClassVar[str | None] = MATRICES

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        every = list(trained)
        vectors = sum(one.numel for one in every if len(one.shape) < 2)
        matrices = [one.shape for one in every if len(one.shape) >= 2]
        sums = sum(prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] for shape in matrices)
        return StateBytes(FP32 * vectors, FP32 * sums)


@section
class Lion(Steps):
    """Lion steps along the sign of a momentum, with half of AdamW's state (Chen et al. 2023, arXiv 2302.06675). Its learning rate
    should be 3 to 10 times smaller than AdamW's, and its weight decay larger by the same factor."""

    name: Literal["lion"]
    beta1: Beta
    """The weight of the momentum in the step."""
    beta2: Beta
    """The decay of the momentum that is kept."""

    def state_bytes(self, trained: Iterable[TrainedShape]) -> StateBytes:
        return bytes_per_value(trained, FP32)


@section
class Muon(Adam):
    """Muon steps along the orthogonalized momentum of a matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Steps are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that its learning rate and weight decay can be
    used. Muon trains the matrices of layers (and of each expert); AdamW trains embeddings, heads, norms and biases.
    """

    name: Literal["muon"]
    momentum: Beta
    nesterov: bool
    adamw_lr_factor: PositiveFloat
    """The learning rate of AdamW as a multiple of optimizer.lr."""
    adamw_moments: Literal["float32", "bfloat16"]
    """The type of AdamW's moments; bfloat16 is rounded as in adamw_bf16."""

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
        super().__post_init__()
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
