"""Knowledge neurons: find them, suppress and enhance them, erase and edit what they write (arXiv 2104.08696)."""

from workbench.neurons.editing import answer_tokens, edit, erase, measure_edit, measure_erase
from workbench.neurons.effects import effect_means, effects
from workbench.neurons.finding import check_finding, knowledge_neurons, selection_of

__all__ = [
    "answer_tokens",
    "check_finding",
    "edit",
    "effect_means",
    "effects",
    "erase",
    "knowledge_neurons",
    "measure_edit",
    "measure_erase",
    "selection_of",
]
