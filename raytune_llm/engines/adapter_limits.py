"""Which adapters another package's engine supports, decided from adapter_config.json before the package loads them.

When a package loads an adapter, it refuses some unsupported fields and silently ignores others. Here all of them are refused,
with the name of the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytune_llm.errors import ConfigError
from raytune_llm.models.lora_starts import changes_the_base
from raytune_llm.models.score_head import refuse_separate_head

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """The adapters that one package supports."""

    package: str
    """Its name for messages, and its Python module."""
    module: str
    max_rank: int
    lacks: frozenset[str] = field(default=frozenset())
    """Keys of UNCOMPUTED that the package does not support."""

    def check(self, folder: str | Path, setting: str) -> int:
        """The adapter's rank. Raises ConfigError, which names the setting, if the package can't compute the folder's adapter."""
        refuse_separate_head(folder, setting)
        config = _read(Path(folder), setting)
        if found := self.uncomputed(config):
            rule = f"must be an adapter that {self.package} supports; it doesn't support {found[0]}"
            raise ConfigError(setting, rule, got=_shown(config.get(found[0])), fix="Set engine=native or engine=hf.")
        rank = largest_rank(config)
        if rank > self.max_rank:
            fix = f"Set serve.max_rank={rank}."
            raise ConfigError(setting, f"must have a rank of at most serve.max_rank={self.max_rank}", got=rank, fix=fix)
        return rank

    def uncomputed(self, config: Mapping[str, Any]) -> list[str]:
        """The fields of an adapter_config.json that the package does not support."""
        return [name for name, what in UNCOMPUTED.items() if name in self.lacks and what(config)]


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank among the layers of a LoRA adapter."""
    return max([int(config["r"]), *(int(one) for one in (config.get("rank_pattern") or {}).values())])


UNCOMPUTED: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "peft_type": lambda config: config.get("peft_type") != "LORA",
    "task_type": lambda config: config.get("task_type") not in ("CAUSAL_LM", None),
    "use_dora": lambda config: bool(config.get("use_dora")),
    "use_rslora": lambda config: bool(config.get("use_rslora")),
    "modules_to_save": lambda config: bool(config.get("modules_to_save")),
    "bias": lambda config: config.get("bias", "none") != "none",
    "lora_bias": lambda config: bool(config.get("lora_bias")),
    "rank_pattern": lambda config: bool(config.get("rank_pattern")),
    "alpha_pattern": lambda config: bool(config.get("alpha_pattern")),
    "init_lora_weights": lambda config: changes_the_base(config.get("init_lora_weights", True)),
    "layer_replication": lambda config: bool(config.get("layer_replication")),
    "target_parameters": lambda config: bool(config.get("target_parameters")),
    "trainable_token_indices": lambda config: bool(config.get("trainable_token_indices")),
    "alora_invocation_tokens": lambda config: bool(config.get("alora_invocation_tokens")),
    "use_bdlora": lambda config: bool(config.get("use_bdlora")),
    "use_qalora": lambda config: bool(config.get("use_qalora")),
}
"""Field of adapter_config.json -> whether a config uses it for something that a package may not support."""


def _read(folder: Path, setting: str) -> Mapping[str, Any]:
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(setting, f"must be a folder with {WEIGHTS}", got=str(folder), fix="Save it as safetensors.")
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config.get("peft_type", "LORA") == "LORA":
            config = {**config, "r": int(config["r"])}
            largest_rank(config)
        return config
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(
            setting, f"must hold an {CONFIG} of PEFT's ({type(error).__name__}: {error})", got=str(folder)
        ) from None


def _shown(value: Any) -> str:
    return json.dumps(value)[:200]
