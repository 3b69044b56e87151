"""Training: one path for LoKI, for every baseline and for full fine-tuning; search, export and cards."""

from workbench.training.asking import FineTune, check_finetune
from workbench.training.batches import IGNORED, collate, efficacy, held_out_prompts, labelled, tokenise, trained_prompts
from workbench.training.bounds import undone
from workbench.training.cards import card, figures_of
from workbench.training.exporting import export
from workbench.training.losses import READS, DivergedError, SemanticLoss, semantic_loss, weighing_all
from workbench.training.run import LEARNING_RATES, TrainingRun, implant, own_randomness
from workbench.training.search import check_rates, search_learning_rate
from workbench.training.watching import DriftWatch
from workbench.training.weighting import sample_weights, token_weights

__all__ = [
    "IGNORED",
    "LEARNING_RATES",
    "READS",
    "DivergedError",
    "DriftWatch",
    "FineTune",
    "SemanticLoss",
    "TrainingRun",
    "card",
    "check_finetune",
    "check_rates",
    "collate",
    "efficacy",
    "export",
    "figures_of",
    "held_out_prompts",
    "implant",
    "labelled",
    "own_randomness",
    "sample_weights",
    "search_learning_rate",
    "semantic_loss",
    "token_weights",
    "tokenise",
    "trained_prompts",
    "undone",
    "weighing_all",
]
