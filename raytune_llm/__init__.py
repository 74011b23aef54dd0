"""Fine-tune, align, sweep and serve language models on Ray, from one composed config.

    from raytune_llm import api, load_config
    result = api.train(load_config("train", ["+experiment=sft_smollm2"]))

Importing this package imports neither torch nor ray.
"""

from raytune_llm.config.load import load_config
from raytune_llm.errors import ConfigError, DataError, ResourceError, UserError

__all__ = ["ConfigError", "DataError", "ResourceError", "UserError", "load_config"]
__version__ = "0.1.0"
