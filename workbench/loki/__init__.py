"""LoKI, low-damage knowledge implanting (arXiv 2505.22120), as a method of peft.

Importing this package registers the method, so that `get_peft_model`, `PeftModel.from_pretrained`, the Auto classes
and transformers' own `load_adapter` know it.
"""

from .adapters import (
    BASELINES,
    METHODS,
    Dense,
    adapter_config,
    adapter_for,
    attach,
    check_method,
    merged_copy,
    refuse_unmergeable,
    trainable_parameters,
)
from .config import LokiConfig
from .layer import LokiLayer
from .loading import load_adapted, put_on, read_config
from .matching import matched, parameter_count
from .model import LokiModel
from .quiet import expected_warnings
from .registration import register
from .sites import down_projections

__all__ = [
    "BASELINES",
    "METHODS",
    "Dense",
    "LokiConfig",
    "LokiLayer",
    "LokiModel",
    "adapter_config",
    "adapter_for",
    "attach",
    "check_method",
    "down_projections",
    "expected_warnings",
    "load_adapted",
    "matched",
    "merged_copy",
    "parameter_count",
    "put_on",
    "read_config",
    "refuse_unmergeable",
    "trainable_parameters",
]

register(LokiConfig, LokiModel)
