"""A workbench for where language models keep what they know, and for teaching them with less damage.

The names below open their rooms when they are first used, so that `import workbench` and `workbench --help` are quick.
peft reads adapters of LoKI once this package is imported, before or after peft.

On Intel's processors a number does not depend on what else is computed with it: their matrix products are told to round
alike for any number of rows and threads (`MKL_CBWR`, unless it is set). That takes hold where this package is imported
before the first product.
"""

import os
from importlib import import_module
from typing import Any

from workbench.announcing import announce

_ROOMS = {
    "Config": "config",
    "Fact": "facts",
    "FactSet": "facts",
    "load_facts": "facts",
    "fictional": "facts",
    "HookedModel": "models",
    "load_model": "models",
    "recall": "recollection",
    "suppress": "suppression",
    "enhance": "suppression",
    "knowledge_neurons": "neurons",
    "attribute": "attribution",
    "plan": "planning",
    "interference": "interfere",
    "harm": "learning",
    "behaviour": "learning",
    "predicts": "learning",
    "layer_advice": "learning",
    "trace": "tracing",
    "Selection": "selection",
    "select": "selection",
    "LokiConfig": "loki",
    "adapter_config": "loki",
    "implant": "training",
    "search_learning_rate": "training",
    "export": "training",
    "load_training_data": "facts",
    "finetune": "finetuning",
    "TrainConfig": "config",
    "filter_facts": "filtering",
    "semantic_loss": "training",
    "DriftWatch": "training",
    "semantic_distance": "semantics",
    "measure_drift": "semantics",
    "attribute_drift": "semantics",
    "measure_forgetting": "forgetting",
    "benchmark": "forgetting",
    "run": "pipeline",
    "RunDir": "results",
    "report": "reporting",
    "publish": "reporting",
}

__all__ = sorted(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    value = getattr(import_module(f"workbench.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})


os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # conditional numerical reproducibility of oneMKL
announce()
