"""What is trained of a model: all weights, a part of them, or an adapter. Other modules ask the section, never its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

Dropout = Annotated[float, Field(ge=0, lt=1)]
Targets = str | list[str]
"""all-linear, every linear layer but the head; names of layers, by their last part; or a regular expression of whole names."""


class TrainedPart:
    """What other modules ask of each choice: the part of a model that a run trains, and what it goes with."""

    name: Any
    trains_base: ClassVar[bool] = False
    """Base weights are trained. If not, they are frozen, and final/ holds an adapter."""
    changes_base: ClassVar[bool] = False
    """The model that is trained has other frozen weights, or other layers, than the one that it was made of."""
    needs_quantized: ClassVar[bool] = False
    """It is for quantized weights only."""
    refuses_quantized: ClassVar[str | None] = None
    """Why it can't be on quantized weights; None if it can."""
    refuses_partitioned: ClassVar[str | None] = None
    """Why its layers' weights can't be partitioned by ZeRO-3; None if they can."""
    refuses_compiled: ClassVar[str | None] = None
    """Why its layers can't be compiled; None if they can."""
    begins_from: ClassVar[int] = 0
    """How many samples of the run a new adapter looks at before the first step."""
    trains_tokens: ClassVar[bool] = False
    """It can have embeddings of tokens that the model lacks."""
    mixes: ClassVar[bool] = False
    """Rows with different adapters of this method can share a batch, as in serving."""
    trained_outside: ClassVar[Sequence[str]] = ()
    """Modules of the model outside of its layers that are trained by name."""
    shares_pass: ClassVar[bool] = False
    """Several runs with such adapters can be trained in one pass over one base (tune.share_base)."""

    @property
    def option(self) -> str:
        """What it is, in a word or two."""
        return self.name


@section
class WholeModel(TrainedPart):
    """What is trained are the model's own weights, and final/ holds a model."""

    trains_base: ClassVar[bool] = True
    path: ClassVar[str | None] = None
    """The saved adapter that a run continues."""
    dropout: ClassVar[float] = 0.0

    @property
    def starts_at_base(self) -> bool:
        """Whether the policy equals the base model before its first step, and at any step with the adapter disabled."""
        return False


@section
class NoAdapter(WholeModel):
    """Full fine-tuning."""

    name: Literal["none"]

    trains_tokens: ClassVar[bool] = True


WHOLE_IN_BITS = "its model is saved whole, frozen weights with the trained ones"


@section
class Freeze(WholeModel):
    """Some layers of the model are trained, and the rest is frozen."""

    name: Literal["freeze"]
    first_layers: PositiveInt | None
    last_layers: PositiveInt | None
    layers: list[int] | None
    """Which layers: the first N, the last N, or those of these numbers, negative ones from the end. One of the three."""
    modules: Literal["all"] | list[str]
    """The modules that are trained in these layers, by name; all: the whole layer."""
    extra_modules: list[str]
    """Modules outside of the layers that are trained too, by the last part of their names: embed_tokens, norm, lm_head."""

    refuses_quantized: ClassVar[str | None] = WHOLE_IN_BITS

    @property
    def trains_tokens(self) -> bool:  # type: ignore[override]
        """Whether modules outside of the layers are trained too, as embeddings are."""
        return bool(self.extra_modules)

    @property
    def trained_outside(self) -> Sequence[str]:  # type: ignore[override]
        return self.extra_modules

    def __post_init__(self) -> None:
        given = {name: value for name in ("first_layers", "last_layers", "layers") if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            rule = "must be one of adapter.first_layers, adapter.last_layers and adapter.layers"
            raise ConfigError("adapter", rule, got=given, fix="Set the others to null.")


@section
class LlamaPro(WholeModel):
    """Wu et al. 2024 (arXiv 2401.02415): new layers between the model's own, which pass on their input before they are trained,
    and are the only ones that are."""

    name: Literal["llama_pro"]
    new_layers: PositiveInt
    """How many; they are inserted at equal distances, so it must divide the number of the model's layers."""

    changes_base: ClassVar[bool] = True
    refuses_quantized: ClassVar[str | None] = WHOLE_IN_BITS


READS_WEIGHTS = "it reads the weights that it is on"


@section
class Layered(TrainedPart):
    """Settings of all adapters on linear layers."""

    targets: Targets
    """Names of the linear layers, by their last part; a regular expression of their whole names; all-linear takes every one but
    the head."""
    last_layers: PositiveInt | None
    """Only the last N layers of the model get an adapter, and the backward pass ends there; null: all layers."""
    layers: list[int] | None
    """Only layers of these numbers get an adapter, negative ones counted from the end; null: all layers."""
    modules_to_save: list[str]
    """Modules that are trained whole beside the adapter and saved with it, by the last part of their names: embed_tokens,
    lm_head, norms."""
    path: str | None
    """A saved adapter of this method to continue, with its own rank, targets and layers."""

    def __post_init__(self) -> None:
        if self.layers is not None and self.last_layers is not None:
            fix = "Set one of them to null."
            raise ConfigError("adapter.layers", "can't be combined with adapter.last_layers", got=self.layers, fix=fix)

    # A method that doesn't says so.
    refuses_quantized: ClassVar[str | None] = READS_WEIGHTS
    refuses_partitioned: ClassVar[str | None] = READS_WEIGHTS

    @property
    def starts_at_base(self) -> bool:
        return self.path is None


@section
class LowRank(Layered):
    dropout: Dropout
    rank: PositiveInt
    alpha: PositiveFloat
    rank_pattern: dict[str, PositiveInt]
    """Other ranks for some layers: the end of a layer's name, or a regular expression of it, -> rank."""
    alpha_pattern: dict[str, PositiveFloat]
    """Likewise for alpha."""
    rslora: bool
    """Kalajdzievski 2023 (arXiv 2312.03732): the scale of B A is alpha / sqrt(rank), so that higher ranks learn as fast as lower
    ones; else alpha / rank."""
    dora: bool
    """Liu et al. 2024 (arXiv 2402.09353): the layer is m * V / |V| by row, where V is the weight that LoRA has changed, and m is
    trained with A and B."""
    lr_ratio: PositiveFloat
    """B's learning rate over optimizer.lr (Hayou et al. 2024, arXiv 2402.12354)."""
    embedding_lr_ratio: PositiveFloat
    """Likewise of adapters on embeddings."""

    @property
    def option(self) -> str:
        variants = [name for name in ("dora", "rslora") if getattr(self, name)]
        return " with ".join(variants if variants and self.name == "lora" else [self.name, *variants])

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return not self.modules_to_save and not self.dora

    @property
    def plain(self) -> bool:
        """Whether its layers are the same in every run, with one rank for all of them."""
        by_name = self.targets == "all-linear" or not isinstance(self.targets, str)
        return by_name and self.layers is None and not self.modules_to_save and not self.rank_pattern

    @property
    def refuses_partitioned(self) -> str | None:  # type: ignore[override]
        return READS_WEIGHTS if self.dora else None

    trains_tokens: ClassVar[bool] = True
    refuses_quantized: ClassVar[str | None] = None


@section
class LoRA(LowRank):
    """Hu et al. 2021 (arXiv 2106.09685): W + alpha / rank * B A, with A and B trained."""

    name: Literal["lora"]
    experts: bool
    """An adapter for each expert too, of adapter.rank, where a mixture has its experts in one tensor. It is added to the weights,
    which costs a copy of a layer's experts."""

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return super().mixes and not self.experts

    @property
    def shares_pass(self) -> bool:  # type: ignore[override]
        return self.plain and not self.experts and not self.dora and self.lr_ratio == self.embedding_lr_ratio == 1

    @property
    def refuses_quantized(self) -> str | None:  # type: ignore[override]
        return "adapter.experts=true adds to the weights that it packs" if self.experts else None

    @property
    def refuses_partitioned(self) -> str | None:  # type: ignore[override]
        return READS_WEIGHTS if self.experts else super().refuses_partitioned

    @property
    def refuses_compiled(self) -> str | None:  # type: ignore[override]
        return "adapter.experts=true adds to weights within the layers" if self.experts else None

    def __post_init__(self) -> None:
        Layered.__post_init__(self)
        if self.experts and self.dropout:
            rule = "must be 0 if adapter.experts is true: what is added to weights has no input to drop"
            raise ConfigError("adapter.dropout", rule, got=self.dropout, fix="Leave it out.")
        if self.experts and self.dora:
            rule = "must be false with adapter.dora=true: PEFT has no lengths of experts' rows"
            raise ConfigError("adapter.experts", rule, got=True, fix="Leave it out, or set adapter=lora.")


@section
class PiSSA(LowRank):
    """Meng et al. 2024 (arXiv 2404.02948): LoRA that begins as a weight's largest singular values, which the frozen weight then
    lacks. It is saved as LoRA of twice the rank on the original weights: what it is at the end, less what it began as."""

    name: Literal["pissa"]
    svd_iterations: NonNegativeInt | None
    """Iterations of a randomized SVD (Halko et al. 2009), which is fast; null: an exact one."""

    changes_base: ClassVar[bool] = True

    @property
    def starts_at_base(self) -> bool:
        """Without the adapter, its base is not the model that it was made of."""
        return False


@section
class LoftQ(LowRank):
    """Li et al. 2023 (arXiv 2310.08659): LoRA that begins as the largest singular values of what quantization takes off a weight.
    One round of it, on the base as it is quantized without."""

    name: Literal["loftq"]

    needs_quantized: ClassVar[bool] = True

    @property
    def starts_at_base(self) -> bool:
        """Without the adapter, its base is what quantization left of the model."""
        return False


@section
class EVA(LowRank):
    """Paischer et al. 2024 (arXiv 2410.07170): LoRA whose A begins as the directions in which a layer's inputs vary most, over
    rows of the run. Ranks are not redistributed over layers (PEFT's rho=1)."""

    name: Literal["eva"]
    rows: PositiveInt
    """How many samples (packs, or rows without packing) it looks at: the first of the run's order."""

    @property
    def begins_from(self) -> int:  # type: ignore[override]
        return self.rows if self.path is None else 0


@section
class OFT(Layered):
    """Qiu et al. 2023 (arXiv 2306.07280), as in Qiu et al. 2025 (arXiv 2506.19847): W R, where R rotates blocks of inputs.

    Each block is the Cayley transform of a skew-symmetric matrix, whose part above the diagonal is trained.
    """

    name: Literal["oft"]
    dropout: Dropout
    block_size: Annotated[int, Field(ge=2)] | None
    """Inputs of a block; must divide each layer's inputs. There are (block_size - 1) / 2 parameters an input."""
    blocks: PositiveInt | None
    """Or the number of blocks of each layer, PEFT's r, in place of their size."""

    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block_size is None) == (self.blocks is None):
            got = "null" if self.blocks is None else self.blocks
            fix = "Set one of them, and the other to null."
            raise ConfigError(
                "adapter.blocks", "must be given where adapter.block_size is null, and only there", got=got, fix=fix
            )


@section
class VeRA(Layered):
    """Kopiczko et al. 2023 (arXiv 2310.11454): W + diag(b) B diag(d) A, where A and B are random, fixed and the same in every
    layer, and the vectors b and d are trained."""

    name: Literal["vera"]
    dropout: Dropout
    rank: PositiveInt
    initial_d: PositiveFloat
    """What each entry of d is at first; b is 0."""
    projection_seed: NonNegativeInt
    """The seed of A and B, which are not saved: PEFT draws them again from it."""

    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None


@section
class IA3(Layered):
    """Liu et al. 2022 (arXiv 2205.05638): outputs of layers, or inputs of others, times a trained vector."""

    name: Literal["ia3"]
    scaled_inputs: list[str]
    """Those of the targets whose inputs are scaled, by the last part of their names."""

    dropout: ClassVar[float] = 0.0
    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None


@section
class SavedAdapter:
    """An adapter of any method in a folder, used as it is. Only code makes one; it is not a setting."""

    path: str
    setting: str
    """The setting that names the folder, for errors."""

    name: ClassVar[str] = "saved"
    changes_base: ClassVar[bool] = False
    trains_base: ClassVar[bool] = False
    dropout: ClassVar[float] = 0.0
    starts_at_base: ClassVar[bool] = False


AdapterConfig = Annotated[
    NoAdapter | Freeze | LlamaPro | LoRA | PiSSA | LoftQ | EVA | OFT | VeRA | IA3,
    Field(discriminator="name"),
]
