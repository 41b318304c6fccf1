"""The arithmetic: medians over rounds, and ratios and differences that are taken within a round."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FLOOR = "nginx"
DIRECT = "direct"
Figures = Mapping[str, float]


def median(values: Iterable[float]) -> float | None:
    """None where there are no values."""
    found = list(values)
    return statistics.median(found) if found else None


@dataclass
class Results:
    """The figures of each contender, one mapping a round; that of a round that failed is empty."""

    rounds: dict[str, list[Figures]] = field(default_factory=dict)

    def add(self, contender: str, figures: Figures) -> None:
        self.rounds.setdefault(contender, []).append(figures)

    def median(self, contender: str, figure: str) -> float | None:
        return median(row[figure] for row in self.rounds.get(contender, ()) if figure in row)

    def ratio(self, contender: str, figure: str, to: str = FLOOR) -> float | None:
        """The median of the ratios in each round: what troubled a whole round troubles them less."""
        pairs = self._pairs(contender, figure, to)
        return median(mine / other for mine, other in pairs if other > 0)

    def added(self, contender: str, figure: str, to: str = DIRECT) -> float | None:
        """The median of the differences in each round."""
        return median(mine - other for mine, other in self._pairs(contender, figure, to))

    def _pairs(self, contender: str, figure: str, to: str) -> list[tuple[float, float]]:
        both = zip(self.rounds.get(contender, ()), self.rounds.get(to, ()), strict=False)
        return [(mine[figure], other[figure]) for mine, other in both if figure in mine and figure in other]
