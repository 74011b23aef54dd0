"""Fine-tune, align, sweep and serve language models on Ray, from one composed config.

    from raytune_llm import api, load_config
    result = api.train(load_config("train", ["+experiment=sft_smollm2"]))

Importing this package imports neither torch nor ray, and Hydra only with `load_config`: each Ray worker imports it.
"""

import time
from typing import TYPE_CHECKING, Any

from raytune_llm.errors import ConfigError, DataError, Diverged, ResourceError, UserError

__all__ = ["ConfigError", "DataError", "Diverged", "ResourceError", "UserError", "load_config", "load_sweep"]
__version__ = "0.1.0"
BEGAN = time.time()
"""When this process imported the package, in seconds since 1970. For a command this is its start. It is not in `__main__`, which
has another module name under `python -m`."""

if TYPE_CHECKING:
    from raytune_llm.config.load import load_config
    from raytune_llm.config.sweep import load_sweep


def __getattr__(name: str) -> Any:
    if name == "load_config":
        from raytune_llm.config.load import load_config

        return load_config
    if name == "load_sweep":
        from raytune_llm.config.sweep import load_sweep

        return load_sweep
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
