"""LoRA on projections that share an input, computed together.

PEFT computes each adapted layer separately: each one reads the activations again for its own A, and adding the scaled product is
another pass over the output, forward and backward. Here, q/k/v and gate/up share one product with their concatenated A matrices,
and the scale is folded into B. B's product is accumulated in place into the base layer's output, and A's into the gradient of the
input. On a GPU, a gated MLP is one operation, in which the products with B of gate and up never reach memory. The layers stay
PEFT's, with their names, so saving, loading and disabling adapters work unchanged.

A gated MLP saves only the outputs of gate and up for the backward pass. The activated gate, and its product with up, are computed
again: two cheap passes that halve what the MLP saves.

With dropout, the layers of a group share one mask (PEFT draws one for each layer; Hu et al. 2021 don't specify it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from raytune_llm.models.adapters.banked import BankedLinear, banked
from raytune_llm.models.adapters.gated import MAX_RANK, gated, gated_backward
from raytune_llm.models.packed import products
from raytune_llm.models.quantization import QUANTIZATIONS, QuantizedLinear

aten = torch.ops.aten
Product = Callable[..., Tensor]

ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""Classes of rotary attention with q_proj, k_proj and v_proj, and optionally Qwen3's q_norm and k_norm."""
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "GemmaMLP", "Gemma2MLP"}
"""Classes that compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
SILU = {"SiLU", "SiLUActivation"}
"""Classes of torch and of transformers that compute x * sigmoid(x)."""


def project(x_BTD: Tensor, layers: Sequence[nn.Module], gate_BTD: Tensor | None = None) -> list[Tensor]:
    """The output of each layer for one shared input: x, or silu(gate) * x if a gate is given.

    Layers with banks compute several adapters at once. If an adapter is disabled, merged or not LoRA, layers run one by one."""
    name = _shared_adapter(layers)
    adapted: list[Any] = list(layers)
    drops = name is not None and not isinstance(adapted[0].lora_dropout[name], nn.Identity)
    if gate_BTD is not None and (name is None or drops or torch.compiler.is_compiling()):  # compilers see what is best kept
        x_BTD, gate_BTD = F.silu(gate_BTD) * x_BTD, None
    if all(isinstance(layer, BankedLinear) for layer in layers):
        return banked(x_BTD, layers)
    if name is None:
        return products(x_BTD, layers)
    dtype = _compute_type(x_BTD)
    x_MD = x_BTD.flatten(0, -2).to(dtype)
    gate_MD = None if gate_BTD is None else gate_BTD.flatten(0, -2).to(dtype)
    a_RD = torch.cat([layer.lora_A[name].weight for layer in adapted]).to(dtype)
    low_MR = adapted[0].lora_dropout[name](x_MD) @ a_RD.T if drops else None
    per_layer = [tensor for layer in adapted for tensor in (_b(layer, name, dtype), *_weights(layer.base_layer))]
    with torch.autocast(x_BTD.device.type, enabled=False):
        outs = ADAPTED[type(adapted[0].base_layer)].apply(x_MD, gate_MD, None if drops else a_RD, low_MR, *per_layer)
    outs = [out.view(*x_BTD.shape[:-1], -1) for out in outs]
    biases = [layer.base_layer.bias for layer in adapted]
    return [out if bias is None else out + bias.to(dtype) for out, bias in zip(outs, biases, strict=True)]


def gated_mlp(x_BTD: Tensor, gate: Any, up: Any, down: Any) -> Tensor:
    """down(silu(gate(x)) * up(x)) as one operation, for layers for which `lacks_for_gated` is None."""
    name = gate.active_adapters[0]
    dtype = _compute_type(x_BTD)
    a_RD = torch.cat([layer.lora_A[name].weight for layer in (gate, up)]).to(dtype)
    down_a_RI = down.lora_A[name].weight.to(dtype)
    b = [_b(layer, name, dtype) for layer in (gate, up, down)]
    weights = [weight for layer in (gate, up, down) for weight in _weights(layer.base_layer)]
    with torch.autocast(x_BTD.device.type, enabled=False):
        run = GATED_MLP[type(gate.base_layer)]
        return run.apply(x_BTD.flatten(0, -2).to(dtype), a_RD, down_a_RI, *b, *weights).view(x_BTD.shape)


def lacks_for_gated(gate: nn.Module, up: nn.Module, down: nn.Module, activation: nn.Module) -> str | None:
    """Why these layers can't be computed as one operation; None if they can."""
    name = _shared_adapter((gate, up, down))
    if name is None:
        return "not one plain adapter over all its layers"
    layers: tuple[Any, ...] = (gate, up, down)
    if type(activation).__name__ not in SILU:
        return "another activation than SiLU"
    if not all(isinstance(layer.lora_dropout[name], nn.Identity) for layer in layers):
        return "adapter.dropout"
    if any(layer.r[name] > MAX_RANK for layer in layers):
        return f"a rank above {MAX_RANK}"
    return "biases" if any(layer.base_layer.bias is not None for layer in layers) else None


class InPlaceOf(nn.Module):
    """Replaces a module, and has its children under the same names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.train(module.training)


class GroupedAttention(InPlaceOf):
    """The attention of the classes in ATTENTIONS, with q, k and v computed together."""

    SHARE_AN_INPUT = ("q_proj", "k_proj", "v_proj")
    reads_weights = True
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, attention: nn.Module) -> None:
        super().__init__(attention)
        self.config: Any = attention.config
        self.layer_idx: Any = attention.layer_idx
        self.head_dim: Any = attention.head_dim
        self.num_key_value_groups: Any = attention.num_key_value_groups
        self.scaling: Any = attention.scaling
        self.attention_dropout: Any = attention.attention_dropout
        self.is_causal = True
        self.window_in_mask: int | None = getattr(attention, "window_in_mask", None)
        self.norms_heads = "q_norm" in self._modules
        self.sliding_window: int | None = _sliding_window(attention)
        self.rotate: Callable[..., tuple[Tensor, Tensor]] = apply_rotary_pos_emb

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        B, T, _ = hidden_states.shape
        query, key, value = (
            x.view(B, T, -1, self.head_dim) for x in project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        (out,) = project(out.reshape(B, T, -1), (self.o_proj,))
        return out, weights


class GroupedMLP(InPlaceOf):
    """The gated MLP of the classes in MLPS, with gate and up computed together."""

    SHARE_AN_INPUT = ("gate_proj", "up_proj")
    reads_weights = True
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    gated: Callable[[Tensor, Tensor], Tensor] | None = None
    """(gate, up) -> act_fn(gate) * up, if that has a function of its own (models/fused.py)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if hidden_states.is_cuda and lacks_for_gated(*layers, self.act_fn) is None:
            return gated_mlp(hidden_states, *layers)
        gate, up = project(hidden_states, (self.gate_proj, self.up_proj))
        if self.gated is not None:
            (out,) = project(self.gated(gate, up), (self.down_proj,))
        elif type(self.act_fn).__name__ in SILU:
            (out,) = project(up, (self.down_proj,), gate)
        else:
            (out,) = project(self.act_fn(gate) * up, (self.down_proj,))
        return out


def group(model: nn.Module) -> nn.Module:
    """Replace attention and MLP modules of known classes by grouped ones; others stay as they are."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ATTENTIONS:
                setattr(parent, name, GroupedAttention(child))
            elif type(child).__name__ in MLPS:
                setattr(parent, name, GroupedMLP(child))
    return model


def described(model: nn.Module, device_type: str) -> str | None:
    """How a model's adapters are computed, and why not in groups, or a gated MLP as one operation, where they are not; None where
    it has none."""
    outer = [module for module in model.modules() if not isinstance(module, LoraLayer)]
    holders = [module for module in outer if any(isinstance(child, LoraLayer) for child in module.children())]
    alone = sorted({type(module).__name__ for module in holders if not isinstance(module, GroupedAttention | GroupedMLP)})
    if alone:
        return f"a layer at a time ({', '.join(alone)} have no grouped form here)"
    mlps = [module for module in holders if isinstance(module, GroupedMLP)] if device_type == "cuda" else []
    lacking = {lacks_for_gated(mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn) for mlp in mlps} - {None}
    gated = f", a gated MLP not as one operation ({'; '.join(sorted(map(str, lacking)))})" if lacking else ""
    return f"projections of one input together{gated}" if holders else None


def _adapter(layer: nn.Module) -> str | None:
    """The plain LoRA adapter in use in the layer; None if there is none, or another method."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    return None if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name] else name


def _shared_adapter(layers: Sequence[nn.Module]) -> str | None:
    """The plain LoRA adapter in use in all the layers, over base layers of one type; None if there is none."""
    name = _adapter(layers[0])
    kind = type(getattr(layers[0], "base_layer", None))
    others: list[Any] = list(layers[1:])
    if name is None or kind not in ADAPTED or any(_adapter(x) != name or type(x.base_layer) is not kind for x in others):
        return None
    return name


def _compute_type(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _b(layer: Any, name: str, dtype: torch.dtype) -> Tensor:
    """B [N, R], multiplied by the scale."""
    return (layer.lora_B[name].weight * layer.scaling[name]).to(dtype)


def _weights(base: nn.Module) -> tuple[Tensor, ...]:
    if isinstance(base, QuantizedLinear):
        return base.weights()
    assert isinstance(base, nn.Linear)
    return (base.weight,)


@torch.library.custom_op("raytune_llm::accumulate_product", mutates_args={"into_MN"})
def _accumulate_product(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> None:
    """into += left @ right, in place. A custom op, since compiled code would copy `into` first."""
    into_MN.addmm_(left_MK, right_KN)


class Frozen(NamedTuple):
    """The products of a kind of frozen layer. If the weight is a plain matrix, its product is accumulated onto the low-rank one
    (GEMM with beta=1). The other order would read and write the whole output once more, and round it twice."""

    product: Product
    """(x [M, K], the tensors of the weight [N, K]) -> x @ weight.T."""
    transposed: Product
    """(grad [M, N], the same tensors) -> grad @ weight."""
    num_weights: int
    """The number of tensors that store the weight; 1: the plain weight."""

    def adapted(self, x_MK: Tensor, weights: Sequence[Tensor], low_MR: Tensor, b_NR: Tensor) -> Tensor:
        """x @ weight.T + low @ b.T."""
        if self.num_weights == 1:
            return _accumulated(low_MR @ b_NR.T, x_MK, weights[0].T)
        return _accumulated(self.product(x_MK, *weights), low_MR, b_NR.T)

    def towards_input(
        self, grads: Sequence[Tensor], weights: Sequence[Sequence[Tensor]], low_grad_MR: Tensor, a_RK: Tensor | None
    ) -> Tensor:
        """The gradient of an input that layers share: the sum of their grad @ weight, plus low_grad @ a."""
        if self.num_weights == 1 and a_RK is not None:
            total = low_grad_MR @ a_RK
            for grad_MN, (weight_NK,) in zip(grads, weights, strict=True):
                total = _accumulated(total, grad_MN, weight_NK)
            return total
        parts = (self.transposed(grad_MN, *held) for grad_MN, held in zip(grads, weights, strict=True))
        total = reduce(torch.add, parts)
        return total if a_RK is None else _accumulated(total, low_grad_MR, a_RK)


def _accumulated(into_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    _accumulate_product(into_MN, left_MK, right_KN)
    return into_MN


def _adapted(kind: Frozen) -> type[torch.autograd.Function]:
    """y_i = x @ weight_i.T + low_i @ b_i.T for the layers of a group, whose weights are frozen.

    Arguments: x [M, D]; optionally a gate [M, D], with which the input is silu(gate) * x; either a [R, D], for low = x @ a.T, or
    low [M, R] itself; then, for each layer, b_i [N_i, R_i] and the tensors of its weight.
    """
    width = 1 + kind.num_weights

    class Adapted(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x_MD: Tensor, gate_MD: Tensor | None, a_RD: Tensor | None, low_MR: Tensor | None, *per_layer: Tensor
        ) -> tuple[Tensor, ...]:
            given = x_MD, gate_MD
            x_MD = x_MD if gate_MD is None else F.silu(gate_MD).mul_(x_MD)
            low = x_MD @ a_RD.T if a_RD is not None else low_MR
            assert low is not None
            bs, weights = per_layer[::width], _of_each(per_layer, width)
            lows = low.split([b_NR.shape[1] for b_NR in bs], dim=1)
            ctx.given_low = a_RD is None
            ctx.save_for_backward(*given, low if a_RD is None else a_RD, low, *per_layer)
            return tuple(kind.adapted(x_MD, held, low_MR, b_NR) for held, low_MR, b_NR in zip(weights, lows, bs, strict=True))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x_MD, gate_MD, a_RD, low, *per_layer = ctx.saved_tensors
            bs, weights = per_layer[::width], _of_each(per_layer, width)
            low_grad = torch.cat([grad @ b_NR for grad, b_NR in zip(grads, bs, strict=True)], dim=1)
            lows = low.split([b_NR.shape[1] for b_NR in bs], dim=1)
            # In this order, since on a CPU a thin matrix on the right takes twice the time.
            towards_bs = [(low_MR.T @ grad).T for low_MR, grad in zip(lows, grads, strict=True)]
            towards_layers = [x for towards_b in towards_bs for x in (towards_b, *[None] * kind.num_weights)]
            towards_x = kind.towards_input(grads, weights, low_grad, None if ctx.given_low else a_RD)
            if ctx.given_low:
                return towards_x, None, None, low_grad, *towards_layers
            if gate_MD is None:
                return towards_x, None, low_grad.T @ x_MD, None, *towards_layers
            active_MD = F.silu(gate_MD)
            product_MD = active_MD * x_MD
            towards_a = low_grad.T @ product_MD
            towards_gate = torch.mul(towards_x, x_MD, out=product_MD)
            aten.silu_backward.grad_input(towards_gate, gate_MD, grad_input=towards_gate)
            return towards_x.mul_(active_MD), towards_gate, towards_a, None, *towards_layers

    return Adapted


def _of_each(per_layer: Sequence[Tensor], width: int) -> list[Sequence[Tensor]]:
    """The tensors of each layer's weight; `per_layer` has each layer's b, then `width` of these."""
    return [per_layer[start + 1 : start + width] for start in range(0, len(per_layer), width)]


def _gated_mlp(kind: Frozen) -> type[torch.autograd.Function]:
    """down(silu(gate(x)) * up(x)), where each layer has a frozen weight and a low-rank part.

    The only tensors [M, I] that are saved for the backward pass are x's products with the frozen weights of gate and up.
    Arguments: x [M, D], a of gate and up [R, D], a of down [R, I], the three b, and the tensors of each layer's weight.
    """

    class GatedMLP(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x_MD: Tensor,
            a_RD: Tensor,
            down_a_RI: Tensor,
            gate_b: Tensor,
            up_b: Tensor,
            down_b: Tensor,
            *weights: Tensor,
        ) -> Tensor:
            of_gate, of_up, of_down = _thirds(weights)
            low = x_MD @ a_RD.T
            gate, up = kind.product(x_MD, *of_gate), kind.product(x_MD, *of_up)
            inner_MI = gated(gate, up, low, gate_b, up_b)
            down_low = inner_MI @ down_a_RI.T
            ctx.save_for_backward(x_MD, a_RD, down_a_RI, gate_b, up_b, down_b, low, gate, up, down_low, *weights)
            return kind.adapted(inner_MI, of_down, down_low, down_b)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
            x_MD, a_RD, down_a_RI, gate_b, up_b, down_b, low, gate, up, down_low, *weights = ctx.saved_tensors
            of_gate, of_up, of_down = _thirds(weights)
            towards_down_low = grad @ down_b
            towards_inner = kind.towards_input([grad], [of_down], towards_down_low, down_a_RI)
            towards_gate, towards_up, inner_MI = gated_backward(towards_inner, gate, up, low, gate_b, up_b)
            towards_low = torch.cat([towards_gate @ gate_b, towards_up @ up_b], dim=1)
            gate_low, up_low = low.split([gate_b.shape[1], up_b.shape[1]], dim=1)
            return (
                kind.towards_input([towards_gate, towards_up], [of_gate, of_up], towards_low, a_RD),
                towards_low.T @ x_MD,
                towards_down_low.T @ inner_MI,
                towards_gate.T @ gate_low,
                towards_up.T @ up_low,
                grad.T @ down_low,
                *[None] * len(weights),
            )

    return GatedMLP


def _thirds(weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    each = len(weights) // 3
    return [weights[start : start + each] for start in (0, each, 2 * each)]


FROZEN = {
    nn.Linear: Frozen(lambda x_MK, weight_NK: x_MK @ weight_NK.T, lambda grad_MN, weight_NK: grad_MN @ weight_NK, 1),
    **{
        kind.layer: Frozen(kind.layer.product, kind.layer.transposed, len(kind.layer.HELD))
        for kind in QUANTIZATIONS.values()
        if kind is not None
    },
}
"""The class of the base layer -> its products."""
ADAPTED = {layer: _adapted(kind) for layer, kind in FROZEN.items()}
GATED_MLP = {layer: _gated_mlp(kind) for layer, kind in FROZEN.items()}


def _sliding_window(attention: Any) -> int | None:
    if type(attention).__name__ == "MistralAttention":
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)
