"""What a model lost: before against after on facts, texts and benchmarks, paired; the only door to lm-eval."""

from workbench.forgetting.around import neighbourhood_as_before
from workbench.forgetting.comparing import ANSWERED, loki_average, mcnemar, paired
from workbench.forgetting.harness import benchmark, find_tasks, lm_eval_installed
from workbench.forgetting.measuring import measure_forgetting
from workbench.forgetting.shipped import TASKS

__all__ = [
    "ANSWERED",
    "TASKS",
    "benchmark",
    "find_tasks",
    "lm_eval_installed",
    "loki_average",
    "mcnemar",
    "measure_forgetting",
    "neighbourhood_as_before",
    "paired",
]
