from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from raytune_llm.config.section import NonNegativeFloat, PositiveFloat, section
from raytune_llm.errors import ConfigError

Reference = Literal["precomputed", "online"]
"""When the reference's log-probabilities are computed. precomputed: once for all rows, before the first step. online: in each
step. The reference is the model at the start of the run, with the adapter that the run continues."""
HalfOpen = Annotated[float, Field(ge=0, lt=0.5)]
DPOLoss = Literal[
    "sigmoid", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "aot_pair",
    "apo_zero", "apo_down", "discopop", "bco_pair", "sigmoid_norm", "f_forward_kl", "f_js", "f_alpha", "sft",
]  # fmt: skip
SFT_READS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("label_smoothing", "z_loss"),
    "dft": (),
    "eaft": ("eaft_alpha",),
    "asft": ("asft_alpha",),
}
"""Loss of SFT -> the settings that only this loss reads."""
DPO_READS: dict[str, tuple[str, ...]] = {
    "sigmoid": ("beta", "label_smoothing"),
    "robust": ("beta", "label_smoothing"),
    "hinge": ("beta",),
    "ipo": ("beta",),
    "ipo_sum": ("beta",),
    "exo_pair": ("beta", "label_smoothing"),
    "nca_pair": ("beta",),
    "sppo_hard": ("beta",),
    "aot": ("beta", "label_smoothing"),
    "aot_unpaired": ("beta", "label_smoothing"),
    "aot_pair": ("beta", "label_smoothing"),
    "apo_zero": ("beta",),
    "apo_down": ("beta",),
    "discopop": ("beta", "discopop_tau"),
    "bco_pair": ("beta",),
    "sigmoid_norm": ("beta",),
    "f_forward_kl": ("beta",),
    "f_js": ("beta",),
    "f_alpha": ("beta", "f_alpha"),
    "sft": (),
}
"""Loss of DPO -> the settings that it reads. The logged rewards depend on beta with any loss."""
OFF_AT_ZERO = {"label_smoothing", "z_loss"}
"""Settings that are off at 0. The others are off at null."""


def _are_read(settings: Mapping[str, float | None], losses: Set[str], reads: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ConfigError unless each setting is given exactly if one of the losses reads it."""
    chosen = "+".join(sorted(losses))
    for setting, value in settings.items():
        readers = [loss for loss, read in reads.items() if setting in read]
        off = value is None or (value == 0 and setting in OFF_AT_ZERO)
        if not off and not losses & set(readers):
            raise ConfigError(
                f"stage.{setting}",
                f"is not read with stage.loss={chosen}",
                got=value,
                fix=f"Leave it out, or set stage.loss={' or '.join(readers)}.",
            )
        if value is None and losses & set(readers):
            raise ConfigError(f"stage.{setting}", f"must be a number with stage.loss={chosen}", got="null")


OF_TOKENS = ("loss", "perplexity", "token_accuracy", "entropy", "nll", "router_aux_loss")
SIDES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
OF_PAIRS = ("loss", *SIDES, "rewards/accuracies")


class StageRules:
    """The properties of a stage that rules between sections and `plan` read."""

    kind: ClassVar[str]
    """The kind of row that it trains on: one of data.kinds.KINDS."""
    has_reference: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    """Its model generates text. If not, it is a Scorer, which gives a number."""
    trains_turns: ClassVar[bool] = False
    """Settings can choose the trained turns. If not, the answer of each side or the whole text is trained."""
    has_right_answers: ClassVar[bool] = False
    """Held-out rows have one right answer, so that exact match makes sense."""
    reads_margins: ClassVar[bool] = False
    plain_text: ClassVar[bool] = False
    """Its rows are not conversations."""
    anchored: ClassVar[bool] = False
    """Its loss compares the policy with the model without its adapter."""
    figures: ClassVar[tuple[str, ...]] = OF_PAIRS
    """The metrics that an evaluation can report, without the prefix eval_."""


class WithoutReference(StageRules):
    reference: ClassVar[Literal["none"]] = "none"
    reference_model: ClassVar[None] = None
    reference_adapter: ClassVar[None] = None


class WithoutRouters(StageRules):
    router_aux_loss_coef: ClassVar[None] = None


@section
class SFT(WithoutReference):
    """Supervised fine-tuning: maximizes the likelihood of the trained tokens."""

    kind: ClassVar[str] = "conversations"
    trains_turns: ClassVar[bool] = True
    has_right_answers: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = OF_TOKENS

    name: Literal["sft"]
    loss: Literal["cross_entropy", "dft", "eaft", "asft"]
    """dft: the loss of each token is weighted by its probability. eaft: by the entropy of its distribution. asft: dft plus a KL
    term to the model without its adapter."""
    label_smoothing: HalfOpen
    """With cross_entropy: the fraction of the target probability that is spread evenly over the vocabulary."""
    z_loss: NonNegativeFloat
    """With cross_entropy: the weight of an added loss, the squared logsumexp of the logits."""
    eaft_alpha: PositiveFloat | None
    """With eaft: the exponent of a token's entropy."""
    asft_alpha: PositiveFloat | None
    """With asft: the weight of the KL term."""
    neftune_alpha: PositiveFloat | None
    """NEFTune: add uniform noise of at most alpha / sqrt(tokens x hidden size) to the embeddings in training. 5 is common."""
    router_aux_loss_coef: PositiveFloat | None
    """The weight of the load-balancing loss of a mixture of experts, computed over each document."""

    def __post_init__(self) -> None:
        given = {
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "eaft_alpha": self.eaft_alpha,
            "asft_alpha": self.asft_alpha,
        }
        _are_read(given, {self.loss}, SFT_READS)

    @property
    def anchored(self) -> bool:  # type: ignore[override]  # of the loss, not of the stage
        return self.loss == "asft"


@section
class Pretrain(WithoutReference):
    """Cross-entropy over every token of plain texts."""

    kind: ClassVar[str] = "text"
    plain_text: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = OF_TOKENS

    name: Literal["pretrain"]
    z_loss: NonNegativeFloat
    """The weight of an added loss, the squared logsumexp of the logits."""
    router_aux_loss_coef: PositiveFloat | None
    """The weight of the load-balancing loss of a mixture of experts, computed over each document."""


@section
class Reward(WithoutReference, WithoutRouters):
    """A reward model: it gives the chosen answer a higher score than the rejected one (Bradley-Terry)."""

    kind: ClassVar[str] = "pairs"
    writes: ClassVar[bool] = False
    reads_margins: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")

    name: Literal["reward"]
    margin: NonNegativeFloat
    """By how much the chosen score should be higher, in addition to the pair's own margin (data.format.margin)."""
    centering: NonNegativeFloat
    """The weight of (chosen + rejected)^2, which keeps scores around 0."""
    value_head: Literal["score", "v_head"]
    """How the score head is saved. score: as a sequence classification model of transformers with one label. v_head: as a
    language model with LLaMA-Factory's value_head.safetensors."""


@section
class DPO(WithoutRouters):
    """Direct preference optimisation and its variants, which compare answers' log-probabilities with those of a reference."""

    kind: ClassVar[str] = "pairs"
    has_reference: ClassVar[bool] = True

    name: Literal["dpo"]
    loss: DPOLoss | dict[DPOLoss, float]
    """One loss, or several with their weights: {sigmoid: 0.8, bco_pair: 0.2, sft: 1.0} is MPO."""
    beta: PositiveFloat
    """The scale of the log-ratios. A smaller value lets the policy move further from the reference."""
    label_smoothing: HalfOpen
    """The assumed probability that a preference is wrong. sigmoid with label smoothing is cDPO."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None
    """LD-DPO: the weight of the tokens of the longer answer that lie beyond the length of the shorter one."""
    sft_weight: NonNegativeFloat
    """The weight of the added cross-entropy of the chosen answer, per token (pref_ftx, rpo_alpha)."""
    discopop_tau: PositiveFloat | None
    """With discopop: the temperature of the switch between its two parts."""
    f_alpha: float | None
    """With f_alpha: the alpha of the divergence."""
    reference: Reference | Literal["none"]
    """none: no reference model; every answer counts as equally likely under the reference."""
    reference_model: str | None
    """A folder or hub id of another model as the reference; null: the model at the start of the run, with its adapter."""
    reference_adapter: str | None
    """A folder with the reference's adapter."""

    def __post_init__(self) -> None:
        names = {self.loss} if isinstance(self.loss, str) else set(self.loss)
        if not names:
            raise ConfigError("stage.loss", "must name a loss", got="{}", fix="For example, sigmoid.")
        weights = {} if isinstance(self.loss, str) else self.loss
        for loss, weight in weights.items():
            if weight <= 0:
                raise ConfigError(
                    f"stage.loss.{loss}", "must be above 0", got=weight, fix="Leave out losses that should not count."
                )
        given = {"label_smoothing": self.label_smoothing, "discopop_tau": self.discopop_tau, "f_alpha": self.f_alpha}
        _are_read(given, names, DPO_READS)
        if "exo_pair" in names and not self.label_smoothing:
            raise ConfigError("stage.label_smoothing", "must be above 0 with exo_pair", got=0.0, fix="For example, 0.001.")
        for setting in ("reference_model", "reference_adapter"):
            if self.reference == "none" and getattr(self, setting) is not None:
                raise ConfigError(f"stage.{setting}", "must be null if stage.reference=none", got=getattr(self, setting))
        if "f_alpha" in names and self.f_alpha == 1:
            raise ConfigError("stage.f_alpha", "must not be 1, where the loss is sigmoid", got=1.0, fix="Set stage.loss=sigmoid.")


@section
class ORPO(WithoutReference, WithoutRouters):
    """Odds-ratio preference optimisation: cross-entropy of the chosen answer plus the log odds ratio of the two answers."""

    kind: ClassVar[str] = "pairs"

    name: Literal["orpo"]
    beta: PositiveFloat
    """The weight of the odds ratio (lambda in the paper)."""


@section
class SimPO(WithoutReference, WithoutRouters):
    """Simple preference optimisation: mean log-probabilities per token, with a margin between the two answers."""

    kind: ClassVar[str] = "pairs"

    name: Literal["simpo"]
    beta: PositiveFloat
    gamma: NonNegativeFloat
    """The margin in units of the reward (the paper's gamma, not gamma / beta)."""
    label_smoothing: HalfOpen
    sft_weight: NonNegativeFloat
    """The weight of the added cross-entropy of the chosen answers (cpo_alpha)."""


@section
class CPO(WithoutReference, WithoutRouters):
    """Contrastive preference optimisation: DPO with a uniform reference."""

    kind: ClassVar[str] = "pairs"

    name: Literal["cpo"]
    beta: PositiveFloat
    label_smoothing: HalfOpen
    sft_weight: NonNegativeFloat
    """The weight of the added cross-entropy of the chosen answers (cpo_alpha)."""


@section
class KTO(WithoutRouters):
    """Kahneman-Tversky optimisation: single answers that are labelled desirable or undesirable."""

    kind: ClassVar[str] = "labeled"
    has_reference: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ("loss", *SIDES, "kl")

    name: Literal["kto"]
    loss: Literal["kto", "apo_zero_unpaired"]
    """apo_zero_unpaired: KTO without the estimate of the KL divergence from the reference."""
    beta: PositiveFloat
    desirable_weight: NonNegativeFloat
    undesirable_weight: NonNegativeFloat
    """The paper recommends (desirable_weight x desirable rows) / (undesirable_weight x undesirable rows) between 1 and 4/3."""
    sft_weight: NonNegativeFloat
    """The weight of the added cross-entropy of the desirable answers, per token (pref_ftx)."""
    reference: Reference
    reference_model: str | None
    """A folder or hub id of another model as the reference; null: the model at the start of the run, with its adapter."""
    reference_adapter: str | None
    """A folder with the reference's adapter."""


StageConfig = Annotated[SFT | Pretrain | Reward | DPO | ORPO | SimPO | CPO | KTO, Field(discriminator="name")]
