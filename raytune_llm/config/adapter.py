"""What is trained of a model: all weights, a part of them, or an adapter. Other modules ask the section, never its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.expressions import check_expressions
from raytune_llm.config.section import NonNegativeInt, PositiveFloat, PositiveInt, section
from raytune_llm.errors import ConfigError

Dropout = Annotated[float, Field(ge=0, lt=1)]
Targets = str | list[str]
"""all-linear (every linear layer except the head), the last parts of layers' names, or a regular expression for whole names."""


class TrainedPart:
    """The part of a model that a run trains. Other modules ask these attributes, so that they never compare `name`."""

    name: Any
    trains_base: ClassVar[bool] = False
    """Base weights are trained. If not, they are frozen, and final/ holds an adapter."""
    changes_base: ClassVar[bool] = False
    """The trained model has other frozen weights, or more layers, than the model at model.path."""
    needs_quantized: ClassVar[bool] = False
    """It needs quantized weights."""
    refuses_quantized: ClassVar[str | None] = None
    """The reason why it can't be combined with quantized weights; None if it can."""
    refuses_partitioned: ClassVar[str | None] = None
    """The reason why ZeRO-3 can't partition its layers' weights; None if it can."""
    refuses_compiled: ClassVar[str | None] = None
    """The reason why its layers can't be compiled; None if they can."""
    begins_from: ClassVar[int] = 0
    """The number of training samples that a new adapter is initialized from; 0: from none."""
    trains_tokens: ClassVar[bool] = False
    """It can train embeddings of new tokens (model.new_tokens)."""
    mixes: ClassVar[bool] = False
    """Rows with different adapters of this method can share a batch, as in serving."""
    trained_outside: ClassVar[Sequence[str]] = ()
    """The names of modules outside the model's layers that it trains."""
    shares_pass: ClassVar[bool] = False
    """Several runs with such adapters can be trained in one pass over one base (tune.share_base)."""

    @property
    def option(self) -> str:
        """Its short name in messages: the option of the group that selects it."""
        return self.name


@section
class WholeModel(TrainedPart):
    """The model's own weights are trained, and final/ holds a model."""

    trains_base: ClassVar[bool] = True
    path: ClassVar[str | None] = None
    """A run continues no adapter."""
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
    """Some layers of the model are trained, the others are frozen."""

    name: Literal["freeze"]
    first_layers: PositiveInt | None
    last_layers: PositiveInt | None
    layers: list[int] | None
    """Exactly one of the three selects the layers: the first N, the last N, or layers by number, where -1 is the last."""
    modules: Literal["all"] | list[str]
    """Names of the modules in these layers that are trained; all: the whole layer."""
    extra_modules: list[str]
    """Modules outside the layers that are trained too, by the last part of their names: embed_tokens, norm, lm_head."""

    refuses_quantized: ClassVar[str | None] = WHOLE_IN_BITS

    @property
    def trains_tokens(self) -> bool:  # type: ignore[override]
        """Whether modules outside the layers are trained too; embeddings are among them."""
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
    """Wu et al. 2024 (arXiv 2401.02415): inserts new layers between the model's own and trains only these. At first a new layer
    returns its input unchanged."""

    name: Literal["llama_pro"]
    new_layers: PositiveInt
    """The number of new layers. They are inserted at equal distances, so it must divide the number of the model's layers."""

    changes_base: ClassVar[bool] = True
    refuses_quantized: ClassVar[str | None] = WHOLE_IN_BITS


READS_WEIGHTS = "it reads the weights that it is on"


@section
class Layered(TrainedPart):
    """Settings of all adapters on linear layers."""

    targets: Targets
    """The linear layers that get an adapter: the last parts of their names, a regular expression for whole names, or all-linear
    for all except the head."""
    last_layers: PositiveInt | None
    """Only the last N layers of the model get an adapter, and the backward pass stops there; null: all layers."""
    layers: list[int] | None
    """Only the layers with these numbers get an adapter (-1 is the last); null: all layers."""
    modules_to_save: list[str]
    """Modules that are trained in full and saved with the adapter, by the last part of their names: embed_tokens, lm_head,
    norms."""
    path: str | None
    """A saved adapter of this method to continue, with its own rank, alpha, targets and layers. The dropout is the run's."""

    def __post_init__(self) -> None:
        if self.layers is not None and self.last_layers is not None:
            fix = "Set one of them to null."
            raise ConfigError("adapter.layers", "can't be combined with adapter.last_layers", got=self.layers, fix=fix)

    # A method that doesn't read the weights overrides these.
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
    """Other ranks for some layers: the end of a layer's name, or a regular expression for it -> rank."""
    alpha_pattern: dict[str, PositiveFloat]
    """Other alphas for some layers, selected in the same way."""
    rslora: bool
    """Scale B A by alpha / sqrt(rank), so that higher ranks learn as fast as lower ones (Kalajdzievski 2023, arXiv 2312.03732).
    false: by alpha / rank."""
    dora: bool
    """DoRA (Liu et al. 2024, arXiv 2402.09353): the weight is m * V / |V| for each row, where V = W + scale * B A. m, the rows'
    magnitudes, is trained with A and B."""
    lr_ratio: PositiveFloat
    """LoRA+: the learning rate of B, as a multiple of optimizer.lr (Hayou et al. 2024, arXiv 2402.12354)."""
    embedding_lr_ratio: PositiveFloat
    """The learning rate of adapters on embeddings, as a multiple of optimizer.lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_expressions("adapter.rank_pattern", self.rank_pattern)
        check_expressions("adapter.alpha_pattern", self.alpha_pattern)

    @property
    def option(self) -> str:
        variants = [name for name in ("dora", "rslora") if getattr(self, name)]
        return " with ".join(variants if variants and self.name == "lora" else [self.name, *variants])

    @property
    def mixes(self) -> bool:  # type: ignore[override]
        return not self.modules_to_save and not self.dora

    @property
    def plain(self) -> bool:
        """Whether the same layers get an adapter in every run, all of one rank."""
        by_name = self.targets == "all-linear" or not isinstance(self.targets, str)
        return by_name and self.layers is None and not self.modules_to_save and not self.rank_pattern

    trains_tokens: ClassVar[bool] = True
    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None


@section
class LoRA(LowRank):
    """Hu et al. 2021 (arXiv 2106.09685): W + alpha / rank * B A, with A and B trained."""

    name: Literal["lora"]
    experts: bool
    """In a mixture of experts, give each expert an adapter of adapter.rank too. It is for models that keep a layer's experts in
    one tensor. The product B A is added to the weights, which takes a copy of a layer's experts in memory."""

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
        return "adapter.experts=true adds to the weights that it is on" if self.experts else None

    @property
    def refuses_compiled(self) -> str | None:  # type: ignore[override]
        return "adapter.experts=true adds to weights within the layers" if self.experts else None

    def __post_init__(self) -> None:
        LowRank.__post_init__(self)
        if self.experts and self.dropout:
            rule = "must be 0 if adapter.experts is true: adapters of experts are added to weights, and there is no input to drop"
            raise ConfigError("adapter.dropout", rule, got=self.dropout, fix="Leave it out.")
        if self.experts and self.dora:
            rule = "must be false with adapter.dora=true: PEFT has no DoRA for experts"
            raise ConfigError("adapter.experts", rule, got=True, fix="Leave it out, or set adapter=lora.")


@section
class PiSSA(LowRank):
    """PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that is initialized with a weight's largest singular values and vectors,
    which are subtracted from the frozen weight.

    It is saved as a LoRA of twice the rank for the original weights: its final value minus its initial value.
    """

    name: Literal["pissa"]
    svd_iterations: NonNegativeInt | None
    """Iterations of a randomized SVD (Halko et al. 2009), which is fast; null: an exact SVD."""

    changes_base: ClassVar[bool] = True

    @property
    def starts_at_base(self) -> bool:
        """False: without the adapter, the frozen weights are not those of the model."""
        return False


@section
class LoftQ(LowRank):
    """LoftQ (Li et al. 2023, arXiv 2310.08659): LoRA that is initialized with the largest singular values and vectors of the
    quantization error. It takes one iteration of the paper's algorithm, so the quantized base is the same as without LoftQ."""

    name: Literal["loftq"]

    needs_quantized: ClassVar[bool] = True

    @property
    def starts_at_base(self) -> bool:
        """False: without the adapter, the frozen weights are the quantized ones, with their error."""
        return False


@section
class EVA(LowRank):
    """EVA (Paischer et al. 2024, arXiv 2410.07170): LoRA whose A is initialized with the directions in which a layer's inputs
    vary most, measured on training samples. Ranks are not redistributed over layers (PEFT's rho=1)."""

    name: Literal["eva"]
    rows: PositiveInt
    """The number of samples (packs, or rows without packing) that it measures: the first ones in the run's order."""

    @property
    def begins_from(self) -> int:  # type: ignore[override]
        return self.rows if self.path is None else 0


@section
class OFT(Layered):
    """OFT (Qiu et al. 2023, arXiv 2306.07280; Qiu et al. 2025, arXiv 2506.19847): the weight becomes W R, where R is
    block-diagonal and rotates blocks of the inputs.

    Each block is the Cayley transform of a skew-symmetric matrix, whose entries above the diagonal are trained.
    """

    name: Literal["oft"]
    dropout: Dropout
    block_size: Annotated[int, Field(ge=2)] | None
    """Inputs of a block; it must divide each layer's number of inputs. A layer has (block_size - 1) / 2 parameters per input."""
    blocks: PositiveInt | None
    """The number of blocks of each layer (PEFT's r), instead of block_size."""

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
    """VeRA (Kopiczko et al. 2023, arXiv 2310.11454): W + diag(b) B diag(d) A. A and B are random, frozen and shared by all
    layers; each layer trains its vectors b and d."""

    name: Literal["vera"]
    dropout: Dropout
    rank: PositiveInt
    initial_d: PositiveFloat
    """The initial value of each entry of d. b is 0 at first."""
    projection_seed: NonNegativeInt
    """The seed of A and B. They are not saved, since PEFT can draw them again from it."""

    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None


@section
class IA3(Layered):
    """(IA)^3 (Liu et al. 2022, arXiv 2205.05638): the outputs of some layers and the inputs of others are multiplied by a trained
    vector."""

    name: Literal["ia3"]
    scaled_inputs: list[str]
    """The targets whose inputs are scaled instead of their outputs, by the last part of their names."""

    dropout: ClassVar[float] = 0.0
    refuses_quantized: ClassVar[str | None] = None
    refuses_partitioned: ClassVar[str | None] = None


@section
class SavedAdapter:
    """An adapter of any method in a folder, used as it was saved. Code creates it; no setting does."""

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
