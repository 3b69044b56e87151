"""Losses that attend to meaning, in `implant` and in anyone's own Trainer.

Definitions of ours, after the findings of "Semantic are Beacons" (arXiv 2405.18292), whose equations were not at hand.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from workbench.config import Config, TrainConfig
from workbench.distances import soft_distance
from workbench.models import HookedModel
from workbench.training.batches import Tokenised, collate, name_of
from workbench.training.weighting import (
    Tokens,
    distances_now,
    learned_tokens,
    sample_distances,
    sample_weights,
    token_weights,
)

log = logging.getLogger(__name__)

#: Settings that each kind of loss reads.
READS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "sample": ("beta", "clip", "refresh", "permuted"),
    "token": ("gamma", "permuted"),
    "soft": ("soft_weight", "permuted"),
}


class Weighed(NamedTuple):
    """The loss of every learned token, and the weight that it has in it where the loss has weights."""

    loss: Float[Tensor, " token"]
    weight: Float[Tensor, " token"] | None = None


@dataclass(frozen=True)
class Tally:
    """Plain cross-entropy and weights of the tokens of some batches."""

    tokens: int = 0
    nll: float = 0.0
    weighted: bool = False
    weight: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def plus(self, nll: Float[Tensor, " token"], weight: Float[Tensor, " token"] | None) -> "Tally":
        """With one more batch."""
        one = replace(self, tokens=self.tokens + len(nll), nll=self.nll + float(nll.detach().sum()))
        if weight is None or not len(nll):
            return one
        low, high = min(self.low, float(weight.min())), max(self.high, float(weight.max()))
        return replace(one, weighted=True, weight=self.weight + float(weight.sum()), low=low, high=high)

    def columns(self) -> dict[str, float]:
        """Means per token, and the extremes of the weights."""
        n = max(self.tokens, 1)
        weights = {"weight_mean": self.weight / n, "weight_min": self.low, "weight_max": self.high}
        return {"nll": self.nll / n} | (weights if self.weighted else {})


class SemanticLoss:
    """What `semantic_loss` makes: a loss for `transformers.Trainer(compute_loss_func=...)`, and what it weighed."""

    def __init__(self, settings: TrainConfig, W_E: Float[Tensor, "d_vocab d_model"]) -> None:
        self.settings, self.W_E = settings, W_E.detach().clone()
        self.weights: Float[Tensor, " sample"] | None = None
        self.warned = False
        self._draw = np.random.default_rng(settings.seed)
        if settings.loss == "soft":
            self.W_E = self.permuted(self.W_E, self._draw)
        self._since = self._whole = Tally()

    def __call__(
        self,
        outputs: Any,
        labels: Int[Tensor, "batch pos"],
        num_items_in_batch: Tensor | int | None = None,
        item: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss per learned token of the whole step; `item` says which of the weighed samples each sequence is."""
        tokens = learned_tokens(outputs["logits"] if isinstance(outputs, dict) else outputs[0], labels)
        if tokens.logits.shape[-1] != len(self.W_E):
            raise ValueError(
                f"The model has {tokens.logits.shape[-1]} tokens and the embedding that gives meaning {len(self.W_E)}: "
                "give that of the model in training."
            )
        self.W_E = self.W_E.to(tokens.logits.device)  # Trainer may have moved the model since it was copied
        loss, weight = LOSSES[self.settings.loss](self, tokens, item)
        if torch.is_grad_enabled():  # trained, not evaluated
            self._since = self._since.plus(tokens.nll, weight)
            self._whole = self._whole.plus(tokens.nll, weight)
        if isinstance(num_items_in_batch, Tensor):  # of several devices: a share for each
            num_items_in_batch = num_items_in_batch.sum().to(loss.device)
        return loss.sum() / (max(len(loss), 1) if num_items_in_batch is None else num_items_in_batch)

    def weigh(self, distance: Float[Tensor, " sample"]) -> Float[Tensor, " sample"]:
        """Sample weights of distances; the permuted control gives each sample the weight of another."""
        weights = sample_weights(distance, self.settings.beta, self.settings.clip)
        return self.permuted(weights, np.random.default_rng(self.settings.seed))

    def permuted(self, rows: Float[Tensor, "n ..."], draw: np.random.Generator) -> Float[Tensor, "n ..."]:
        """Weights, or meanings, in another order for the permuted control, else as they are."""
        return rows[torch.from_numpy(draw.permutation(len(rows)))] if self.settings.permuted else rows

    @property
    def draw(self) -> np.random.Generator:
        """What the control of a batch is drawn from; an evaluation takes nothing from that of the training."""
        return self._draw if torch.is_grad_enabled() else np.random.default_rng(self.settings.seed)

    def taken(self) -> dict[str, float]:
        """Columns of a history since this was last asked: plain `nll` (nats per learned token), and the weights."""
        since, self._since = self._since, Tally()
        return since.columns()

    def summary(self) -> dict[str, Any]:
        """The kind, the settings that it reads, and the mean, smallest and largest weight of all trained tokens."""
        weights = {name: value for name, value in self._whole.columns().items() if name != "nll"}
        return {name: getattr(self.settings, name) for name in ("loss", *READS[self.settings.loss])} | weights


def plain(how: SemanticLoss, tokens: Tokens, item: Tensor | None) -> Weighed:
    """Cross-entropy."""
    return Weighed(tokens.nll)


def sample(how: SemanticLoss, tokens: Tokens, item: Tensor | None) -> Weighed:
    """Cross-entropy times the weight of the sample: as last refreshed, or among this batch where `item` is missing."""
    if item is not None and how.weights is not None and (item >= 0).all():  # else of an evaluation
        weight = how.weights[item.cpu()].to(tokens.nll)[tokens.row]
    else:
        rows, row = tokens.row.unique(return_inverse=True)
        if len(rows) == 1 and not how.warned:
            log.warning("A batch of one sequence has nothing to be weighed against; see `weighing_all`.")
            how.warned = True
        distance = sample_distances(tokens._replace(row=row, logits=tokens.logits.detach()), len(rows), how.W_E)
        weight = how.permuted(sample_weights(distance, how.settings.beta, how.settings.clip), how.draw)
        weight = weight.to(tokens.nll)[row]
    return Weighed(weight * tokens.nll, weight)


def token(how: SemanticLoss, tokens: Tokens, item: Tensor | None) -> Weighed:
    """Cross-entropy times the weight of the token."""
    weight = token_weights(tokens.logits, tokens.target, how.W_E, how.settings.gamma)
    weight = how.permuted(weight, how.draw)
    return Weighed(weight * tokens.nll, weight)


def soft(how: SemanticLoss, tokens: Tokens, item: Tensor | None) -> Weighed:
    """Cross-entropy plus `soft_weight` times the semantic distance to expect, `d_soft`."""
    return Weighed(tokens.nll + how.settings.soft_weight * soft_distance(tokens.logits, tokens.target, how.W_E))


#: Kind -> the loss of every learned token.
LOSSES: dict[str, Callable[[SemanticLoss, Tokens, Tensor | None], Weighed]] = {
    "plain": plain,
    "sample": sample,
    "token": token,
    "soft": soft,
}


def semantic_loss(
    kind: str,
    base: HookedModel | nn.Module | Float[Tensor, "d_vocab d_model"],
    *,
    beta: float = 1.0,
    clip: float = 5.0,
    refresh: int = 20,
    gamma: float = 1.0,
    soft_weight: float = 1.0,
    permuted: bool = False,
    seed: int = 0,
) -> SemanticLoss:
    """A loss for anyone's `transformers.Trainer(..., compute_loss_func=semantic_loss("soft", model))`.

    Per learned token (label other than -100; a label at position t is predicted at t - 1), ce its cross-entropy:
    `plain` ce; `sample` w ce, w of `sample_weights`; `token` w ce, w of `token_weights`; `soft` ce + soft_weight
    d_soft. The sum is divided by the number of learned tokens of the whole step, gradient accumulation included, as
    Trainer does by itself, so `plain` is Trainer's own loss.

    Trainer does not tell a loss which samples it sees, so alone `sample` weighs the sequences of every batch against
    each other, by their own distances (mean `d_soft` of their learned tokens) at that step; a batch of one sequence has
    weight 1. With `weighing_all`, as in `implant`, the weights are of all samples.

    What a model adds to its own loss (the terms of AdaLoRA and KaSA, a router's balance) is not part of it.

    Args:
        kind: a name of `LOSSES`.
        base: whose input embedding gives meaning: a model before training, or the matrix. It is copied, so it stays
            as it is now, also when the model is trained in full.
        beta: `sample`: how much weight follows distance; negative prefers what is near.
        clip: `sample`: weights lie between 1/clip and clip.
        refresh: `sample`: with `weighing_all`, optimiser steps from one weighing to the next.
        gamma: `token`: how much more a token weighs whose greedy choice means something else.
        soft_weight: `soft`: weight of the term.
        permuted: the control: `sample` and `token` give weights to the wrong samples or tokens of a batch; `soft`
            gives every token of the vocabulary the meaning of another, drawn once.
        seed: of that control.

    Raises:
        ValueError: an unknown kind, or a setting out of its range.
    """
    settings = {"loss": kind, "beta": beta, "clip": clip, "refresh": refresh, "gamma": gamma}
    settings |= {"soft_weight": soft_weight}
    changes = {f"training.{name}": value for name, value in {**settings, "permuted": permuted, "seed": seed}.items()}
    chosen = Config.read(changes=changes).training
    if isinstance(base, HookedModel):
        return SemanticLoss(chosen, base.W_E)
    matrix: Any = base if isinstance(base, Tensor) else base.get_input_embeddings().weight  # type: ignore[operator]
    return SemanticLoss(chosen, matrix)


class DivergedError(ValueError):
    """The loss became NaN or infinite."""


class Refresh(TrainerCallback):
    """Weighs all samples anew, by the model in training, at the start and every so many optimiser steps."""

    def __init__(self, loss: SemanticLoss, items: Sequence[Tokenised]) -> None:
        self.loss, self.items = loss, items

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the weights of another training, or of before the checkpoint."""
        self.loss.weights = None

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """One forward pass over everything that is trained, where the loss has weights of samples."""
        settings = self.loss.settings
        if settings.loss != "sample" or (self.loss.weights is not None and state.global_step % settings.refresh):
            return
        distance = distances_now(model, self.items, self.loss.W_E)
        if not distance.isfinite().all():
            raise DivergedError(f"The model says no numbers at step {state.global_step}: use a smaller learning rate.")
        self.loss.weights = self.loss.weigh(distance)


def weighing_all(
    loss: SemanticLoss, items: Sequence[Tokenised], make: type[Trainer] = Trainer
) -> tuple[type[Trainer], Refresh, Callable[..., Any]]:
    """What makes a loss of kind "sample" weigh all samples against each other, anew every `refresh` steps.

    `items` are what is trained, as `tokenise` gives them; others, as in an evaluation, are weighed batch by batch.
    Gives a trainer like `make`, a callback and a collator:

        trainer_class, refresh, collator = weighing_all(loss, items)
        trainer_class(model, args, train_dataset=items, data_collator=collator, callbacks=[refresh],
                      compute_loss_func=loss).train()

    Raises:
        ValueError: two items with one id.
    """
    places = {name_of(item): place for place, item in enumerate(items)}
    if len(places) < len(items):
        twice = next(name_of(item) for place, item in enumerate(items) if places[name_of(item)] != place)
        raise ValueError(f"Two of the samples to be weighed have the id {twice!r}: give each its own.")
    return knowing_items(make, loss), Refresh(loss, items), partial(collate, places=places)


def knowing_items(make: type[Trainer], loss: SemanticLoss) -> type[Trainer]:
    """A trainer like `make` that tells the loss which samples a batch holds: the column `item` of `collate`."""

    class Knowing(make):  # type: ignore[misc, valid-type]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            item = inputs.pop("item")
            if model.training and (item < 0).any():
                raise ValueError("A sample is trained that is not among those to be weighed: give all that is trained.")
            self.compute_loss_func = partial(loss, item=item)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Knowing
