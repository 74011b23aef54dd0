"""A folder with a model that transformers has not: its config, its code and random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raytune_llm.data.tokens.tokenizer import byte_tokenizer

CODE = '''
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OwnConfig(PretrainedConfig):
    model_type = "own_way"

    def __init__(self, vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **more):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**more)


class OwnBlock(nn.Module):
    """Attention that falls off with distance, written out."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.norm, self.norm_2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden):
        B, T, D = hidden.shape
        query, key, value = self.query_key_value(self.norm(hidden)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        distance = torch.arange(T, device=hidden.device)[:, None] - torch.arange(T, device=hidden.device)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 - 0.1 * distance
        scores = scores.masked_fill(distance < 0, float("-inf"))
        hidden = hidden + self.dense((scores.softmax(-1) @ value).transpose(1, 2).reshape(B, T, D))
        return hidden + self.down(nn.functional.gelu(self.up(self.norm_2(hidden))))


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["OwnBlock"]


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, use_cache=None, **ignored):
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            hidden = block(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.last_norm(hidden))


class OwnForCausalLM(OwnPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **more):
        hidden = self.transformer(input_ids, inputs_embeds).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
'''
CONFIG = {
    "model_type": "own_way",
    "architectures": ["OwnForCausalLM"],
    "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
}


def with_own_code(folder: Path, code: str = CODE) -> Path:
    """The weights are drawn with seed 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modeling_own.py").write_text(code)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    trusted: dict[str, Any] = {"trust_remote_code": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **trusted), **trusted)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
