"""Estimates a run's GPU memory from the model's dimensions.

The estimate counts what torch's eager autograd keeps for a decoder like Llama (RMS norms in float32, rotary positions,
grouped-query attention, a gated MLP). The method is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4). Other families
are close: a layer without a gate keeps a little less, a layer with more norms a little more; of a mixture's experts, those that a
token visits count. Not included: the CUDA context and libraries (about 1 GiB), and gaps between blocks.

The tests compare it with peaks measured on an H100 (Llama-3-8B, LoRA of rank 8, bf16, a pack of 8,192 tokens; with and without
recomputation, compiled); it is within 10% of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import PretrainedConfig

from raytune_llm.config.adapter import AdapterConfig
from raytune_llm.config.optimizer import TrainedShape
from raytune_llm.config.quantization import QuantizationConfig
from raytune_llm.memory.flops import Operations, operations_of
from raytune_llm.models.adapters import OWN, Kept, adapt
from raytune_llm.models.build import UNQUANTIZED
from raytune_llm.models.frozen_start import once_for_each_batch
from raytune_llm.models.head import CHUNK_TOKENS, TRAINED_CHUNKS
from raytune_llm.models.layers import frozen_first, heads_of, largest, layers
from raytune_llm.models.load import load_model
from raytune_llm.models.quantization import Quantization, check_layers, frozen_experts, linears_but
from raytune_llm.models.vocabulary import grow

FP32 = 4
LOGIT_BYTES, COMPILED_LOGIT_BYTES = 3 * FP32, 2 * FP32
"""Bytes per logit at the peak of the loss. Eager: the logit in float32, the softmax that is kept, and the entropy's product or
the gradient; a logit in 16 bits is added to these. Compiled: the logit, a float32 buffer for the gradient, and the result."""
PLAIN = Kept()
NO_OPERATIONS = Operations(per_token=0.0, per_pair=0.0)
NO_PIECES: Mapping[int, Sequence[int]] = MappingProxyType({})
IN_FLIGHT = 4
"""With offloaded inputs, the number of layers whose inputs are on the device at a time."""
ZERO_BUCKET, ZERO3_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in elements: reduce_bucket_size and stage3_max_live_parameters."""


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The widths of a decoder, in values per token."""

    layers: int
    hidden: int
    intermediate: int
    """The inner width of the MLP; for a mixture of experts, the sum over the experts that a token visits."""
    query: int
    """The width of all query heads together."""
    key_value: int
    """The width of all key heads together; the values have as much again."""
    vocab: int


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters. Tied parameters count once."""

    total: int
    trained: int
    layer: int
    """Parameters of the largest layer: the unit that sharding gathers."""
    outside_layers: int
    """Parameters outside the layers: embedding, head and last norm."""
    trained_shapes: tuple[TrainedShape, ...] = ()
    """The shape of every trained tensor."""
    saved: int = 0
    """Parameters that final/ holds: those of the adapter, or of the whole model."""
    quantizable: int = 0
    """Parameters of the frozen linear layers, without the head."""
    experts: int = 0
    """Parameters of a mixture's frozen experts, if a layer has them in one tensor."""
    frozen_first: int = 0
    """Layers before the first trained one. They keep no activations for a backward pass."""
    known_first: int = 0
    """Those of them whose output for a batch can be cached (models/frozen_start.py)."""
    operations: Operations = NO_OPERATIONS

    @property
    def frozen(self) -> int:
        return self.total - self.trained


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Temporary gathered or converted copies of weights, communication buffers, and workspaces of libraries."""
    activations: int
    """Activations of all layers, kept from the forward to the backward pass."""
    logits: int
    """The logits of one chunk of trained tokens, and the loss's intermediate values."""
    layer: int
    """The backward pass of one layer: its gradients, and its activations if they are recomputed."""
    reference: int = 0
    """A separate reference model, or copies of the trained weights, at the start and now."""
    known: int = 0
    """The cached output of frozen first layers, on a CPU."""
    gradients_stay: bool = True
    """They are there during the forward pass, too."""

    @property
    def total(self) -> int:
        """The peak. Logits are freed before the first layer's backward pass begins, so only the larger of the two counts.
        Gradients that don't stay come as activations go: at its end all of them are there, and no activations."""
        kept = self.weights + self.optimizer + self.buffers + self.reference + self.known
        begins = self.activations + max(self.logits, self.layer)
        if self.gradients_stay:
            return kept + self.gradients + begins
        return kept + max(begins, self.gradients + self.layer)


@dataclass(frozen=True, kw_only=True)
class States:
    """Memory that is allocated all the time, in bytes, and properties of the weights that activations depend on."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    wide_norms: bool
    """Norms have float32 weights and give float32, while products are narrower, so that every linear layer converts its input."""
    gradients_stay: bool = True
    """From one step to the next, or from one micro-batch to the next."""
    whole_head: bool = True
    """The head is a single unsharded matrix. If not, its logits are computed again in the backward pass, and none are kept."""


def dimensions(config: PretrainedConfig) -> Dimensions:
    text: Any = config.get_text_config()
    heads, head = heads_of(config)
    return Dimensions(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        query=heads * head,
        key_value=(largest(text, "num_key_value_heads") or heads) * head,
        vocab=text.vocab_size,
    )


def _intermediate(text: Any) -> int:
    dense = largest(text, "intermediate_size") or 4 * text.hidden_size  # GPT-2 and its kin leave it out
    experts = getattr(text, "num_experts_per_tok", None)
    if not experts:
        return dense
    each = getattr(text, "moe_intermediate_size", None) or dense
    return experts * each + (getattr(text, "shared_expert_intermediate_size", None) or 0)


def count_parameters(
    config: PretrainedConfig,
    adapter: AdapterConfig,
    *,
    trust_remote_code: bool = False,
    scores: bool = False,
    first_pieces: Mapping[int, Sequence[int]] = NO_PIECES,
    quantization: QuantizationConfig = UNQUANTIZED,
) -> Parameters:
    """Count the parameters of the adapted model, built without memory (on torch's meta device).

    scores: the model has a score head instead of a language head. first_pieces: for new tokens, as in models.vocabulary.grow.
    Raises ConfigError for layers that the quantization can't hold.
    """
    settings: dict[str, Any] = {"weights": "random", "dtype": torch.float32, "seed": 0, "device": "meta"}
    model = load_model(config, None, **settings, trust_remote_code=trust_remote_code, scores=scores)
    grow(model, first_pieces)
    with torch.device("meta"):
        adapters = adapt(model, adapter, scores=scores, new_ids=sorted(first_pieces))
    adapted = adapters.model
    check_layers(layers(adapted), quantization)
    blocks = [_numel(block) for block in layers(adapted)]
    weights = [linear.weight for *_, linear in linears_but(layers(adapted), skip_modules=())]
    experts = [module.get_parameter(name) for module, name in frozen_experts(layers(adapted))]
    in_layers = {parameter: number for number, layer in enumerate(layers(adapted)) for parameter in layer.parameters()}
    total = _numel(adapted)
    return Parameters(
        total=total,
        saved=total if adapter.trains_base else adapters.saved_values(OWN),
        trained=sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad),
        layer=max(blocks, default=0),
        outside_layers=total - sum(blocks),
        trained_shapes=tuple(TrainedShape(tuple(p.shape), in_layers.get(p)) for p in adapted.parameters() if p.requires_grad),
        quantizable=sum(weight.numel() for weight in weights if not weight.requires_grad),
        experts=sum(weight.numel() for weight in experts),
        frozen_first=len(frozen_first(model)),
        known_first=once_for_each_batch(model),
        operations=operations_of(adapted, model, config),
    )


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def memory_per_gpu(
    dimensions: Dimensions,
    parameters: Parameters,
    states: States,
    *,
    compute: int,
    tokens: int,
    dropout: bool = False,
    adapter: Kept = PLAIN,
    kept: float = 1.0,
    inputs_leave: bool = False,
    compiled: bool = False,
    mask_bytes: int = 0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Memory:
    """The peak memory of a training step if every token is trained.

    compute: bytes of a value in matrix products and between layers. tokens: tokens of a micro-batch, with padding. dropout:
    adapted layers have dropout on their inputs. adapter: what adapted layers keep. kept: the fraction of a layer's activations
    that is not recomputed. inputs_leave: inputs of recomputed layers are offloaded to host memory. mask_bytes: size of an
    attention mask, if the back end needs one. chunk_tokens: trained tokens whose logits exist at the same time with a frozen
    head; a trained head takes more, and keeps the gradients of all.
    """
    d = dimensions
    trains_all = parameters.frozen == 0
    kept_layers = max(d.layers - parameters.frozen_first, 0)
    trains_layers = trains_all or (kept_layers > 0 and parameters.trained >= kept_layers * parameters.layer)
    layer = tokens * _layer_bytes(
        d, compute, trains_all=trains_layers, wide_norms=states.wide_norms, dropout=dropout, adapter=adapter, compiled=compiled
    )
    if adapter.multiplied and kept_layers:
        layer += tokens * _multiplied_bytes(parameters.trained_shapes, compute) // kept_layers
    inputs = tokens * compute * d.hidden * (0 if kept == 1 else min(kept_layers, IN_FLIGHT) if inputs_leave else kept_layers)
    # Gradients of the MLP's product and of its two factors, and of the input of a norm in float32.
    backward = tokens * (3 * compute * d.intermediate + 2 * FP32 * d.hidden)
    last_norm = tokens * (FP32 + 2 * compute) * d.hidden
    keeps_logits = trains_all and states.whole_head
    at_once = min(tokens, chunk_tokens * (TRAINED_CHUNKS if keeps_logits else 1))
    narrow = compute if compute < FP32 else 0
    logits = at_once * d.vocab * (COMPILED_LOGIT_BYTES if compiled else LOGIT_BYTES + narrow)
    before = (tokens - at_once) * d.vocab * compute if keeps_logits else 0
    return Memory(
        weights=states.weights,
        gradients=states.gradients,
        optimizer=states.optimizer,
        buffers=states.buffers,
        activations=inputs + kept_layers * round(kept * layer) + last_norm + mask_bytes,
        logits=logits + before,
        layer=backward + round((1 - kept) * layer),
        gradients_stay=states.gradients_stay,
    )


def _layer_bytes(
    d: Dimensions, compute: int, *, trains_all: bool, wide_norms: bool, dropout: bool, adapter: Kept, compiled: bool
) -> int:
    """Bytes that one layer keeps per token for its backward pass. An adapter is assumed on every linear layer.

    - A norm keeps its input in float32 and, if its weight is trained, the normalized input.
    - Attention keeps queries, keys, values and its result.
    - The MLP keeps gate, activated gate and up. With LoRA it keeps only gate and up, from which the input of down is computed
      again, unless that has dropout.
    - A linear layer with trained parameters keeps its input: one copy for layers with the same input, unless each converts it.
      With dropout it also keeps the input after dropout, and a mask of one byte per value.
    - Compiled, a norm keeps its input in its own type, and the activated gate is computed again.
    """
    product_again = not trains_all and not dropout and not adapter.alone
    outputs = round(adapter.outputs * compute * (d.query + 2 * d.key_value + 2 * d.hidden + 2 * d.intermediate))
    attention = compute * 2 * (d.query + d.key_value)
    if compiled:
        return compute * (4 * d.hidden + (2 if product_again else 3) * d.intermediate) + attention + outputs
    norms = 2 * d.hidden * (FP32 + (compute if trains_all else 0))
    mlp = compute * (2 if product_again else 3) * d.intermediate
    converts = wide_norms or (adapter.converts and compute < FP32)
    inputs = compute * ((5 if converts else 2) * d.hidden + (0 if product_again else d.intermediate)) if adapter.inputs else 0
    if adapter.converts and compute < FP32:
        inputs += compute * d.query
    if dropout:
        inputs += (compute + 1) * ((5 if adapter.alone else 2) * d.hidden + d.query + d.intermediate)
    return norms + attention + mlp + inputs + outputs


def _multiplied_bytes(trained: Sequence[TrainedShape], compute: int) -> int:
    """Bytes per token, in all layers, of the outputs [N, 1] and the inputs [1, K] that trained vectors multiply."""
    vectors = [one.shape for one in trained if one.layer is not None and len(one.shape) == 2 and 1 in one.shape]
    return sum(compute * outputs if inputs == 1 else FP32 * inputs for outputs, inputs in vectors)


def quantized_bytes(parameters: Parameters, compute: int, quantization: Quantization | None) -> int:
    """Bytes that quantization saves on the weights; 0 for a mixture whose experts it can't hold, which is refused elsewhere."""
    if quantization is None or (parameters.experts and quantization.replaces_experts is None):
        return 0
    of_layers = parameters.quantizable * (compute - quantization.bits_per_weight / 8)
    return round(of_layers + parameters.experts * (compute - quantization.expert_bits / 8))


def ddp_states(parameters: Parameters, compute: int, world: int, *, optimizer_bytes: int, accumulates: bool) -> States:
    """Every worker holds everything. Gradients are views of DDP's buckets, so buckets take no extra memory. Autocast keeps a copy
    of each trained matrix in the compute type until the backward pass."""
    p = parameters
    return States(
        weights=compute * p.frozen + FP32 * p.trained,
        gradients=FP32 * p.trained,
        optimizer=optimizer_bytes,
        buffers=compute * p.trained if compute < FP32 else 0,
        wide_norms=p.frozen == 0 and compute < FP32,
        gradients_stay=world > 1 or accumulates,
    )


def fsdp_states(
    parameters: Parameters,
    compute: int,
    world: int,
    *,
    optimizer_bytes: int,
    accumulates: bool,
    reshard: str,
    shard_workers: int | str,
    prefetch: int,
    offload: bool,
) -> States:
    """Every worker holds shards. Gathered in the compute type are embedding and head for the whole pass, the layer that runs, and
    the prefetched layers with a receive buffer; or all layers, if they are kept for the backward pass (reshard=grad_only).

    Between micro-batches without synchronization, gradients are unsharded float32.
    """
    p = parameters
    shards = shard_workers if isinstance(shard_workers, int) else world
    on_the_way = min((2 + prefetch) * p.layer, p.total - p.outside_layers)
    gathered = p.total if reshard == "grad_only" else p.outside_layers + on_the_way
    on_gpu = 0 if offload else 1
    return States(
        weights=on_gpu * (compute * p.frozen + FP32 * p.trained) // shards,
        gradients=FP32 * p.trained if accumulates else on_gpu * FP32 * p.trained // shards,
        optimizer=on_gpu * optimizer_bytes // shards,
        buffers=compute * gathered,
        wide_norms=False,
        gradients_stay=accumulates,
    )


def deepspeed_states(
    parameters: Parameters, compute: int, world: int, *, optimizer_bytes: int, accumulates: bool, stage: int, offload: bool
) -> States:
    """The whole model is in the compute type. A float32 copy of the trained weights is sharded in every stage, and counts as
    optimizer state.

    Stages 1 and 2 have two buckets of gradients, one that fills while the other is reduced. Stage 3 has one, and keeps gathered
    weights up to a limit.
    """
    p = parameters
    gradients = compute * p.trained
    buffers = compute * (2 * ZERO_BUCKET if stage < 3 else ZERO_BUCKET + min(p.total, ZERO3_LIVE))
    weights = compute * p.total
    return States(
        weights=weights if stage < 3 else 0 if offload else weights // world,
        gradients=gradients if stage == 1 else 0 if offload else gradients // world,
        optimizer=0 if offload else (FP32 * p.trained + optimizer_bytes) // world,
        buffers=buffers,
        wide_norms=False,
        whole_head=stage < 3,
    )


STATES: dict[str, Callable[..., States]] = {"ddp": ddp_states, "fsdp": fsdp_states, "deepspeed": deepspeed_states}
"""Strategy -> its states. optimizer_bytes: the optimizer's state for all trained parameters."""
