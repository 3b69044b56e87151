"""Opening models and looking into them: the only door to transformer-lens and to transformers' loading."""

from workbench.models.devices import free_memory, peak_memory
from workbench.models.half import HALF, in_float32
from workbench.models.hooked import (
    PROBES,
    HookedModel,
    Patch,
    Unit,
    check_unit,
    forward_through,
    inputs_first,
    pad_batch,
    projection_widths,
)
from workbench.models.loading import load_model, own_tokenizer
from workbench.models.promises import check_finite, probe_ids
from workbench.models.sources import default_model, has_tokenizer, lacks_tokenizer, list_models, load_hf, tokenizer_of

__all__ = [
    "HALF",
    "PROBES",
    "HookedModel",
    "Patch",
    "Unit",
    "check_finite",
    "check_unit",
    "default_model",
    "forward_through",
    "free_memory",
    "has_tokenizer",
    "in_float32",
    "inputs_first",
    "lacks_tokenizer",
    "list_models",
    "load_hf",
    "load_model",
    "own_tokenizer",
    "pad_batch",
    "peak_memory",
    "probe_ids",
    "projection_widths",
    "tokenizer_of",
]
