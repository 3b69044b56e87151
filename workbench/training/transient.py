"""Transient drift: how far every fact was from its start at most while a model was trained."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from workbench.facts import TokenisedFact

COLUMNS = ("group", "fact", "metric", "most", "step")


class Transient:
    """Keeps, over readings, how far every fact of a group was by a metric each time it went farther than before."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str, str], list[tuple[float, int]]] = {}

    def note(self, group: str, facts: Sequence[TokenisedFact], metric: str, away: Sequence[float], step: int) -> None:
        """Take one reading, a number a fact; what is not a number is farther than any, and ties go to the first."""
        for fact, value in zip(facts, away, strict=True):
            records = self.records.setdefault((group, fact.fact_id, metric), [])
            most = records[-1][0] if records else -math.inf
            if most == most and not value <= most:
                records.append((value, step))

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Go on from rows of an earlier `history`, in place of what was noted of their facts."""
        taken: dict[tuple[str, str, str], list[tuple[float, int]]] = {}
        for row in rows:
            records = taken.setdefault((row["group"], str(row["fact"]), row["metric"]), [])
            records.append((float(row["most"]), int(row["step"])))
        self.records |= taken

    @property
    def history(self) -> pd.DataFrame:
        """Every time a fact went farther: its rows up to a step say how far it was at most up to that step."""
        rows = [(*key, *record) for key, records in self.records.items() for record in records]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    @property
    def frame(self) -> pd.DataFrame:
        """A row a group, fact and metric: group, fact, metric, most, step."""
        return pd.DataFrame([(*key, *records[-1]) for key, records in self.records.items()], columns=list(COLUMNS))

    def means(self, metric: str) -> dict[str, float]:
        """The mean over facts by group; a fact that was not a number makes it not one either."""
        rows = self.frame
        groups = rows[rows["metric"] == metric].groupby("group", sort=False)["most"]
        return {str(name): float(most.mean(skipna=False)) for name, most in groups}
