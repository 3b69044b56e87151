"""Transient drift: how far every fact was from its start at most while a model was trained."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from workbench.facts import TokenisedFact

COLUMNS = ("group", "fact", "metric", "most", "step")


class Transient:
    """Keeps, over readings, the farthest that every fact of a group was by a metric, and the step of it."""

    def __init__(self) -> None:
        self.farthest: dict[tuple[str, str, str], tuple[float, int]] = {}

    def note(self, group: str, facts: Sequence[TokenisedFact], metric: str, away: Sequence[float], step: int) -> None:
        """Take one reading, a number a fact; what is not a number is farther than any, and ties go to the first."""
        for fact, value in zip(facts, away, strict=True):
            key = (group, fact.fact_id, metric)
            most = self.farthest.get(key, (-1.0, 0))[0]
            if most == most and not value <= most:
                self.farthest[key] = (value, step)

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Go on from the rows of an earlier frame."""
        for row in rows:
            self.farthest[row["group"], str(row["fact"]), row["metric"]] = (float(row["most"]), int(row["step"]))

    @property
    def frame(self) -> pd.DataFrame:
        """A row a group, fact and metric: group, fact, metric, most, step."""
        return pd.DataFrame([(*key, *value) for key, value in self.farthest.items()], columns=list(COLUMNS))

    def means(self, metric: str) -> dict[str, float]:
        """The mean over facts by group; a fact that was not a number makes it not one either."""
        rows = self.frame
        groups = rows[rows["metric"] == metric].groupby("group", sort=False)["most"]
        return {str(name): float(most.mean(skipna=False)) for name, most in groups}
