"""What learning one fact does to others: a deterministic learner, its harm, which measure predicts it, layer advice."""

from workbench.learning.advice import layer_advice, quotas
from workbench.learning.candidates import FEWEST
from workbench.learning.foreseeing import foresee
from workbench.learning.harms import harm
from workbench.learning.learner import gradients, learnt, natural_rate, unlocked
from workbench.learning.pairs import mantel
from workbench.learning.predicting import by_layer, predicts, verdict
from workbench.learning.together import averages, behaviour, effective_rank

__all__ = [
    "FEWEST",
    "averages",
    "behaviour",
    "by_layer",
    "effective_rank",
    "foresee",
    "gradients",
    "harm",
    "layer_advice",
    "learnt",
    "mantel",
    "natural_rate",
    "predicts",
    "quotas",
    "unlocked",
    "verdict",
]
