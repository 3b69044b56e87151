"""What every measure is given, and what it gives back for a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from workbench.facts import FactSet, TokenisedFact
from workbench.interfere.activation import mean_activation
from workbench.models import HookedModel, free_memory
from workbench.results import Parts
from workbench.tracing.spans import subject_tokens

Scores = Float[np.ndarray, "fact unit"]
Matrix = Float[np.ndarray, "fact other"]


class Draw(NamedTuple):
    """What one draw of shuffled units gives: the largest, smallest and mean value of two facts, and the share of pairs
    below 0, each pair the mean of its two directions.
    """

    largest: float
    smallest: float
    mean: float
    below: float


@dataclass(frozen=True)
class Found:
    """What a measure finds in one layer.

    Attributes:
        value: entry [i, j] is what fact j does to fact i; the diagonal is a fact with itself.
        free: every draw in which each fact's units are shuffled.
        matched: the same, shuffled only among units of similar size.
        matched_on: what that size is.
        by_fact: more numbers of the layer, one a fact, by the name of their variable in the result.
        notes: attributes of the result; lists are joined over layers, anything else is the same in all of them.
    """

    value: Matrix
    free: Sequence[Draw]
    matched: Sequence[Draw]
    matched_on: str
    by_fact: Mapping[str, Float[np.ndarray, " fact"]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Problem:
    """What every measure is given: facts in the order of the result, their scores, and how much memory it may take."""

    facts: FactSet
    attribution: xr.Dataset
    top: int  # units in a fact's set
    seed: int = 0
    model: HookedModel | None = None
    passages: Sequence[str] = ()
    memory: float | int | None = None  # GiB
    progress: bool = False
    parts: Parts = field(default_factory=lambda: Parts(None, {}))  # what is kept of unfinished work
    draws: int = 1  # of random units, for "suppression"

    @property
    def layers(self) -> list[int]:
        """The layers of the attribution, in its order."""
        return [int(layer) for layer in self.attribution["layer"].values]

    @property
    def opened(self) -> HookedModel:
        """The model; a measure that needs one is refused without it before it starts."""
        assert self.model is not None
        return self.model

    @cached_property
    def tokens(self) -> list[TokenisedFact]:
        """The facts as the model's tokens."""
        return self.opened.tokenise(self.facts)

    @cached_property
    def subjects(self) -> list[range | None]:
        """Where the subject's tokens stand in every prompt; None where they cannot be told."""
        tokenizer = self.opened.tokenizer
        found: list[range | None] = []
        for fact, tokens in zip(self.facts, self.tokens, strict=True):
            try:
                found.append(subject_tokens(fact, tokens, tokenizer))
            except ValueError:  # a slow tokenizer, or a subject that shares a token with the answer
                found.append(None)
        return found

    @property
    def has_units(self) -> bool:
        """Whether there is a model whose layers and units are those of the attribution."""
        return (
            self.model is not None
            and self.attribution.sizes["unit"] == self.model.width(self.attribution.attrs["unit"])
            and max(self.layers) < self.model.n_layers
        )

    @cached_property
    def activation(self) -> dict[str, Float[np.ndarray, "layer unit"]]:
        """Mean |activation| of every unit over the facts, by scope; see `mean_activation`."""
        return mean_activation(self.opened, self.tokens, str(self.attribution.attrs["unit"]))

    @property
    def budget(self) -> float:
        """Bytes that may be taken: as asked, or half of what is free."""
        return free_memory(self.opened.device) / 2 if self.memory is None else self.memory * 2**30

    def scores(self, layer: int) -> Scores:
        """The scores of one layer."""
        return np.asarray(self.attribution["score"].sel(layer=layer).transpose("fact", "unit").values)

    def generator(self, layer: int) -> np.random.Generator:
        """What a layer's nulls are drawn from: the same for every measure, whichever others are asked for."""
        return np.random.default_rng([self.seed, layer])
