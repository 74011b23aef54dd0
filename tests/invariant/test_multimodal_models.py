"""Text training on checkpoints of several media: towers and projectors are left out of it, and whole in what is saved."""

from __future__ import annotations

import json
import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

from raytune_llm import ConfigError, api
from raytune_llm.data.batches import collate
from raytune_llm.data.pipeline import prepare
from raytune_llm.models import attention
from raytune_llm.models.attention.isolation import needs_lines
from raytune_llm.models.causal_lm import CausalLM
from raytune_llm.models.load import auto_class, load_config, load_model, model_class
from raytune_llm.models.multimodal import TRAINED_ON_TEXT
from tests.group import Group, metrics
from tests.models import logits, packed, some_rows
from tests.runs import tiny_run

TEXT = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "eos_token_id": 257, "pad_token_id": 258,
    "bos_token_id": 256,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
QWEN = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 1, "intermediate_size": 48}
QWEN |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
WHOLE_ROPE = {"rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
LLAVA = {"vision_config": TOWER | {"model_type": "siglip_vision_model"}}
GLM = {"vision_config": QWEN | {"image_size": 28, "patch_size": 14}}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 262, "num_kv_shared_layers": 2, "sliding_window": 4}
PER_LAYER |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16}
CONFIGS = {
    "aya_vision": LLAVA | {"text_config": TEXT | {"model_type": "cohere2"}},
    "cohere2_vision": LLAVA | {"text_config": TEXT | {"model_type": "cohere2"}},
    "gemma4": {
        "text_config": TEXT | PER_LAYER | {"final_logit_softcapping": 0.05},
        "vision_config": TOWER | {"global_head_dim": 8, "position_embedding_size": 16, "pooling_kernel_size": 1},
        "audio_config": None,
    },
    "glm4v": GLM | {"text_config": TEXT | WHOLE_ROPE},
    "glm4v_moe": GLM
    | {
        "text_config": TEXT
        | WHOLE_ROPE
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    },
    "idefics3": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER},
    "internvl": {
        "text_config": TEXT | {"model_type": "qwen2"},
        "vision_config": TOWER | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "lfm2_vl": {
        "text_config": TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "vision_config": TOWER | {"num_patches": 4},
    },
    "llava_next": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": TOWER | {"model_type": "clip_vision_model"}},
    "llava_onevision": LLAVA | {"text_config": TEXT | {"model_type": "qwen2"}},
    "smolvlm": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER},
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 4, "query_pre_attn_scalar": 8},
        "vision_config": TOWER,
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": TEXT
        | {"num_hidden_layers": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "num_local_experts": 4},
        "vision_config": TOWER
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 1.0},
    },
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | {"model_type": "clip_vision_model"}},
    "mistral3": {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": TOWER | {"model_type": "pixtral"}},
    "qwen2_vl": {"text_config": TEXT | ROPE, "vision_config": QWEN},
    "qwen2_5_vl": {"text_config": TEXT | ROPE, "vision_config": QWEN},
    "qwen3_vl": {"text_config": TEXT | ROPE, "vision_config": QWEN},
    "qwen3_vl_moe": {"text_config": TEXT | ROPE | EXPERTS, "vision_config": QWEN},
    "qwen3_5": {"text_config": TEXT | ROPE | LINEAR, "vision_config": QWEN},
    "qwen3_5_moe": {"text_config": TEXT | ROPE | LINEAR | EXPERTS, "vision_config": QWEN},
}
MARKS = {"image_token_id": 259, "image_token_index": 259, "video_token_id": 260, "boi_token_index": 260, "eoi_token_index": 261}


def stored(model_type: str, folder: Path) -> str:
    """A folder with such a model, its weights random."""
    known = AutoConfig.for_model(model_type).to_dict()
    marks = {name: value for name, value in MARKS.items() if name in known}
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type], **marks, tie_word_embeddings=False)
    torch.manual_seed(0)
    auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def whole(folder: str | Path):
    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32).eval()


def of_other_media(model) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in model.state_dict().items()
        if "visual." in name or "vision" in name or "multi_modal" in name
    }


def test_every_family_is_tried() -> None:
    assert sorted(CONFIGS) == sorted(TRAINED_ON_TEXT)


@pytest.mark.parametrize("model_type", TRAINED_ON_TEXT)
def test_a_row_beside_another_gets_what_the_whole_model_gives_it(model_type: str, tmp_path: Path) -> None:
    path = stored(model_type, tmp_path)
    model = load_model(load_config(path, {}), path, weights="pretrained", dtype=torch.float32, seed=0)
    assert not of_other_media(model) and of_other_media(whole(path))
    rows, plain, in_lines = some_rows([7, 12]), whole(path), needs_lines(model.config, type(model))
    if not in_lines:
        attention.attach(model, "varlen")
    batch = collate([[row] for row in rows], length=16, pad_id=0) if in_lines else packed(rows)
    with torch.no_grad():
        together = CausalLM(model.eval(), in_lines=in_lines)(batch, logits)
        alone = [plain(input_ids=torch.tensor(ids).long()[None]).logits[0, first - 1 : -1] for ids, (first, _) in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "adapter"),
    [*product(TRAINED_ON_TEXT, ["lora"]), *product(["gemma3", "gemma4", "qwen2_vl", "qwen3_5"], ["none"])],
)
def test_what_is_saved_loads_in_transformers_with_its_towers_as_they_were(
    model_type: str, adapter: str, chat_rows: str, cache: str, tmp_path: Path
) -> None:
    path = stored(model_type, tmp_path / "base")
    processor = [tmp_path / "base" / name for name in ("preprocessor_config.json", "processor_config.json")]
    for file in processor:
        file.write_text(f'{{"size": {len(file.name)}}}')
    settings = ["model=hub", f"model.path={path}", "model.tokenizer=bytes", f"adapter={adapter}", "train.max_steps=2"]
    config = AutoConfig.from_pretrained(path)
    settings += ["data.packing=false"] if needs_lines(config, model_class(config)) else []
    settings += ["adapter.rank=4"] if adapter == "lora" else []
    run = tiny_run(chat_rows, cache, tmp_path / "run", *settings)
    api.train(run)
    final = tmp_path / "run" / "final"
    if adapter == "lora":
        names = load_file(final / "adapter_model.safetensors")
        assert names and not any("vis" in name or "projector" in name for name in names)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # of layers that it was not trained on
            PeftModel.from_pretrained(whole(path), final)
        return
    assert all((final / file.name).read_text() == file.read_text() for file in processor)
    before, after = whole(path), whole(final)
    assert before.state_dict().keys() == after.state_dict().keys()
    towers = of_other_media(after)
    assert towers and all(torch.equal(value, towers[name]) for name, value in of_other_media(before).items())
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_two_workers_train_an_adapter_and_the_whole_under_each_strategy(chat_rows: str, cache: str, tmp_path: Path) -> None:
    path = stored("gemma3", tmp_path / "base")
    settings = ["model=hub", f"model.path={path}", "model.tokenizer=bytes", "train.max_steps=3", "data.eval_fraction=0"]
    one = tiny_run(chat_rows, cache, tmp_path / "one", *settings)
    store = str(prepare(one.model, one.data, one.resources, kind="conversations").store.folder)
    api.train(one)
    group = Group(2)
    try:
        for number, changes in enumerate((["strategy=ddp"], ["strategy=fsdp"], ["strategy=fsdp", "adapter=none"])):
            folder = tmp_path / str(number)
            group.run(tiny_run(chat_rows, cache, folder, *settings, "resources=local", *changes), store)
            if "adapter=none" in changes:
                assert of_other_media(whole(folder / "final"))
            else:
                losses = [[record["loss"] for record in metrics(str(at))] for at in (tmp_path / "one", folder)]
                assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    finally:
        group.close()


OF_OTHERS = {
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}},
    "musicgen_melody": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}, "decoder": {}},
    "gemma4_assistant": {"text_config": TEXT | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
OTHERS = ("t5", "bart", "gemma3n", "mllama", "paligemma", "whisper", "clip", "musicgen", "musicgen_melody", "phi4_multimodal")


@pytest.mark.parametrize("model_type", [*OTHERS, "gemma4_assistant"])
def test_what_is_no_language_model_is_refused_by_name(model_type: str, chat_rows: str, cache: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": model_type} | OF_OTHERS.get(model_type, {})))
    path = ["model=hub", f"model.path={tmp_path / 'base'}", "model.tokenizer=bytes"]
    with pytest.raises(ConfigError, match=rf"model\.path must be .*{model_type}.*(llama, mistral|gemma3, gemma4)"):
        api.train(tiny_run(chat_rows, cache, tmp_path / "run", *path))
    assert not (tmp_path / "run").exists()
