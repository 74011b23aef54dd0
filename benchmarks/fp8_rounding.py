"""Where the loss of products in FP8 comes from: SmolLM2's linear layers, rounded on a CPU as quantization=fp8 rounds them.

    scripts/bench fp8_rounding [--data alpaca_en_demo.json] [--tokens 2300]

For each choice of modules that stay in float32: the KL divergence, in millinats, of the next-token distributions from those of
the unrounded model, its mean over the answers' tokens. Also for weights or activations alone, and for other sizes of a scale's
group: one scale a tensor, and one per 64 values of a row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_llm import packaged

DATA = Path(__file__).resolve().parents[2] / "shared/data/alpaca_en_demo.json"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SKIPPED: dict[str, Sequence[str]] = {
    "none": (),
    "o_proj": ("o_proj",),
    "v_proj": ("v_proj",),
    "down_proj": ("down_proj",),
    "q_proj_k_proj_v_proj": ("q_proj", "k_proj", "v_proj"),
    "attention": ATTENTION,
    "gate_proj_up_proj": ("gate_proj", "up_proj"),
    "first_and_last_layer": ("layers.0.", "layers.29."),
}
E4M3 = torch.float8_e4m3fn


def rounded(values: Tensor, group: int | str = "row") -> Tensor:
    """The values in e4m3 and back. group: what has a scale of its own: a `row`, the `tensor`, or so many values of a row."""
    parts = values if isinstance(group, str) else values.unflatten(-1, (-1, group))
    largest = parts.abs().amax() if group == "tensor" else parts.abs().amax(dim=-1, keepdim=True)
    scale = largest.clamp(min=1e-12) / torch.finfo(E4M3).max
    return ((parts / scale).to(E4M3).float() * scale).view_as(values)


def round_layers(model: nn.Module, skipped: Sequence[str], *, weights: bool = True, activations: bool = True, **how: Any) -> None:
    """Round the operands of the model's linear layers, except the head and those whose names have one of these parts."""

    def round_input(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return rounded(*inputs, **how)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head" and not any(part in name for part in skipped):
            if weights:
                layer.weight.data = rounded(layer.weight.data, **how)
            if activations:
                layer.register_forward_pre_hook(round_input)


def answers(data: Path, tokenizer: Any, tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Token ids [1, T] of conversations with so many tokens in all, and where the answer of each begins."""
    for row in json.loads(data.read_text()):
        asked = [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = [*prompt, *tokenizer(row["output"], add_special_tokens=False).input_ids]
        yield torch.tensor([ids]), len(prompt)
        tokens -= len(ids)
        if tokens <= 0:
            return


@torch.no_grad()
def distributions(model: Any, rows: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Log-probabilities [tokens of answers, V]."""
    return torch.cat([model(ids).logits[0, start - 1 : -1].log_softmax(dim=-1) for ids, start in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--tokens", type=int, default=2300)
    asked = parser.parse_args()
    path = packaged.resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = list(answers(asked.data, tokenizer, asked.tokens))
    load = partial(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    exact = distributions(load(), rows)
    labels = torch.cat([ids[0, start:] for ids, start in rows])

    def millinats(skipped: Sequence[str] = (), **how: Any) -> float:
        model = load()
        round_layers(model, skipped, **how)
        return round(1000 * F.kl_div(distributions(model, rows), exact, log_target=True, reduction="batchmean").item(), 2)

    result = {
        "loss": round(F.nll_loss(exact, labels).item(), 3),
        "answer_tokens": len(labels),
        "not_rounded": {name: millinats(skipped) for name, skipped in SKIPPED.items()},
        "weights_alone": millinats(activations=False),
        "activations_alone": millinats(weights=False),
        "one_scale_a_tensor": millinats(group="tensor"),
        "one_scale_per_64_values": millinats(group=64),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
