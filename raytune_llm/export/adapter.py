"""`export.format=adapter`: the adapter alone, as PEFT, vLLM and SGLang load it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from raytune_llm.config.run import ExportRun
from raytune_llm.engines import sglang_host, vllm_host
from raytune_llm.engines.adapter_limits import CONFIG, WEIGHTS, AdapterLimits, largest_rank
from raytune_llm.errors import ConfigError
from raytune_llm.export.in_quantized import is_quantized
from raytune_llm.export.rows import Rows
from raytune_llm.export.source import DTYPES, Source
from raytune_llm.export.target import OnBytes, Target
from raytune_llm.export.tensors import converted
from raytune_llm.models.adapters.saved import in_peft_alone
from raytune_llm.models.load import load_config, load_model
from raytune_llm.models.score_head import has_separate_head


def adapter(source: Source, run: ExportRun) -> Target:
    """Raises ConfigError unless there is exactly one adapter, trained on the unchanged base."""
    dtype = run.export.dtype
    if dtype not in ("auto", *DTYPES):
        rule = f"must be auto or one of {', '.join(DTYPES)} with export.format=adapter"
        raise ConfigError("export.dtype", rule, got=dtype)
    _check(source)
    from_folder = Path(source.adapters[0][0].folder)

    def write(folder: Path, on_bytes: OnBytes) -> None:
        source.copy_others(folder)
        config = json.loads((from_folder / CONFIG).read_text())
        config |= {"base_model_name_or_path": str(source.model.path), "inference_mode": True}
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if dtype == "auto":
            shutil.copyfile(from_folder / WEIGHTS, folder / WEIGHTS)
        else:
            tensors = {name: converted(name, value, DTYPES[dtype]) for name, value in load_file(from_folder / WEIGHTS).items()}
            save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        on_bytes((folder / WEIGHTS).stat().st_size)

    def outputs_of(folder: Path, rows: Rows, device: torch.device) -> Iterator[Tensor]:
        return _outputs_in_peft(folder, source, rows, device)

    num_bytes = _num_bytes(from_folder / WEIGHTS, DTYPES.get(dtype))
    return Target(num_bytes, write, outputs_of, "peft", dtype, merges=False, notes=_loaded_by(from_folder, source))


def _check(source: Source) -> None:
    fix = "Set export.format=hf, which merges what there is."
    if len(source.adapters) != 1:
        rule = f"must be one adapter with export.format=adapter, and there are {len(source.adapters)}"
        raise ConfigError("export.adapters", rule, fix=fix)
    one, factor = source.adapters[0]
    if factor != 1.0:
        raise ConfigError("export.weights", "must be 1 with export.format=adapter", got=factor, fix=fix)
    if has_separate_head(one.folder):
        raise ConfigError(one.setting, "has a score head that PEFT doesn't load, with export.format=adapter", got=one.folder)
    for name in ("config", "merged_adapters"):
        changed = getattr(source.run.model if source.run is not None else source.model, name)
        if changed:
            rule = (
                f"must be a run without model.{name} with export.format=adapter: other programs put the adapter on the base alone"
            )
            raise ConfigError("export.run", rule, got=changed)


def _num_bytes(weights: Path, dtype: torch.dtype | None) -> int:
    if dtype is None:
        return weights.stat().st_size
    with safe_open(weights, framework="pt") as file:
        return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()) * dtype.itemsize  # noqa: SIM118


@torch.no_grad()
def _outputs_in_peft(folder: Path, source: Source, rows: Rows, device: torch.device) -> Iterator[Tensor]:
    """The outputs computed by transformers and PEFT alone, without this project's layers."""
    base = _base(source)
    if source.token_ids:
        base.resize_token_embeddings(source.vocab_size, mean_resizing=False)
    base.config.pad_token_id = None  # rows have no padding, and may end in that token
    model = in_peft_alone(base, folder).eval().to(device)
    for ids in rows.ids:
        logits = model(torch.from_numpy(ids.astype("int64"))[None].to(device)).logits[0].float().cpu()
        yield logits if source.scores else logits[:-1].log_softmax(-1)


def _base(source: Source) -> Any:
    trust = source.model.trust_remote_code
    config = load_config(str(source.folder), {}, trust_remote_code=trust)
    if is_quantized(config):  # transformers' reader would need the method's package, but these weights are dequantized
        options: dict[str, Any] = {"weights": "pretrained", "dtype": torch.float32, "seed": 0, "scores": source.scores}
        return load_model(config, str(source.folder), trust_remote_code=trust, **options)
    kind: Any = AutoModelForSequenceClassification if source.scores else AutoModelForCausalLM
    more = {"num_labels": 1} if source.scores else {}
    return kind.from_pretrained(source.folder, dtype=torch.float32, trust_remote_code=trust, **more)


def _loaded_by(folder: Path, source: Source) -> str:
    """The card's section on how each program loads the adapter, or why it refuses it."""
    config = json.loads((folder / CONFIG).read_text())
    grown = f", after `base.resize_token_embeddings({source.vocab_size})`" if source.token_ids else ""
    others = (vllm_host.limits_of(vllm_host.RANKS[-1]), sglang_host.limits_of(largest_rank(config) if "r" in config else 1))
    lines = [f"- PEFT: `PeftModel.from_pretrained(base, folder)`{grown}."]
    lines += [f"- {limits.package}: {_said(limits, config)}." for limits in others]
    return "## Loaded by\n\n" + "\n".join(lines)


def _said(limits: AdapterLimits, config: Mapping[str, Any]) -> str:
    if found := limits.uncomputed(config):
        return f"refused; it does not support {', '.join(f'`{name}`' for name in found)}"
    rank = largest_rank(config)
    if rank > limits.max_rank:
        return f"refused; ranks are at most {limits.max_rank}, and this one's is {rank}"
    return f"with LoRA enabled and a maximum rank of at least {rank}"
