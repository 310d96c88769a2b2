"""From figures to verdicts: ratios between runs of one round, their spread, and what may be said about an aim.

Ratios are turned so that above 1 Fleecer is better, whichever way the figure goes. Nothing is averaged across rounds
before the ratio is taken: what slows the machine for a while slows both sides of a round alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Figures = dict[str, float]
"""What one run of one subject gave, by name."""

Rounds = Sequence[Figures | None]
"""A subject's runs in order of rounds; None where a run failed."""

Samples = Mapping[str, Rounds]
"""Each subject's rounds, by its name."""

FLEECER = "fleecer"
LIMIT = "limit"
"""What an aim is against when it is a limit on Fleecer's own figure."""


LEVEL = 0.05
"""Without an aim, ratios that differ from 1 by no more than this in every round are called level."""


class BenchError(Exception):
    """A run that did not do what its cell says. One line: which program, what was expected, what was seen."""


@dataclass(frozen=True)
class Measure:
    """One figure of a cell.

    `aims` gives, for a family of subjects ("qsd", "nbdkit"), the ratio aimed at; for LIMIT, what Fleecer's own figure
    should stay below. `cpu` names the figure that holds what the server's processor time was for the same work.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"] = "higher"
    aims: Mapping[str, float] = field(default_factory=dict)
    cpu: str | None = None


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of what the rounds gave."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a measure, Fleecer's figure, the peer's, and what that means.

    `ratio` is Fleecer against `peer`; where `against` is LIMIT it is None and `own` is what counts. `cpu_ratio` is the
    peer's processor time for the same work in Fleecer's.
    """

    cell: str
    measure: Measure
    against: str
    peer: str
    own: Spread
    peer_median: float | None
    ratio: Spread | None
    cpu_ratio: float | None
    aim: float | None
    verdict: str


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError if there are no values."""
    if not values:
        raise ValueError("a spread needs at least one value")
    return Spread(statistics.median(values), min(values), max(values), len(values))


def family(subject: str) -> str:
    """What kind of subject a name stands for: its first word."""
    return subject.split(" ", 1)[0]


def series(rounds: Rounds, name: str) -> list[float]:
    """The values of one figure, of the rounds that have it."""
    return [run[name] for run in rounds if run is not None and name in run]


def ratios(own: Rounds, peer: Rounds, measure: Measure) -> list[float]:
    """Fleecer against the peer, round by round; rounds that lack a side are left out."""
    found: list[float] = []
    for ours, theirs in zip(own, peer, strict=False):
        if ours is None or theirs is None or measure.name not in ours or measure.name not in theirs:
            continue
        above, below = ours[measure.name], theirs[measure.name]
        if measure.better == "lower":
            above, below = below, above
        if below > 0:
            found.append(above / below)
    return found


def best(samples: Samples, measure: Measure, kind: str) -> str | None:
    """Which subject of a family has the better median in this measure; None where none has any value."""
    medians = {
        name: statistics.median(values)
        for name, rounds in samples.items()
        if family(name) == kind and (values := series(rounds, measure.name))
    }
    if not medians:
        return None
    return (max if measure.better == "higher" else min)(medians, key=lambda name: medians[name])


def verdict_on_ratio(found: Spread, aim: float | None) -> str:
    """What the rounds allow to say. They disagree by more than the difference where they lie on both sides of it."""
    line = 1.0 if aim is None else aim
    if aim is None and found.low >= 1 - LEVEL and found.high <= 1 + LEVEL:
        return "level"
    if found.low < line <= found.high:
        return "unclear"
    if aim is not None:
        return "met" if found.low >= aim else "missed"
    return "better" if found.low >= 1 else "worse"


def verdict_on_limit(found: Spread, limit: float) -> str:
    """Whether Fleecer's own figure stays below a limit in every round."""
    if found.high < limit:
        return "met"
    return "missed" if found.low >= limit else "unclear"


def rows(cell: str, measures: Sequence[Measure], samples: Samples) -> list[Row]:
    """The lines of a cell: each measure against the best of each family that did the cell, and against its limit."""
    own = samples.get(FLEECER, ())
    lines: list[Row] = []
    for measure in measures:
        values = series(own, measure.name)
        if not values:
            continue
        for kind in ("qsd", "nbdkit", "floor"):
            peer = best(samples, measure, kind)
            found = ratios(own, samples[peer], measure) if peer is not None else []
            if peer is not None and found:
                aim = measure.aims.get(kind)
                ratio = spread(found)
                verdict = "-" if kind == "floor" and aim is None else verdict_on_ratio(ratio, aim)
                theirs = statistics.median(series(samples[peer], measure.name))
                cpu = _cpu_ratio(own, samples[peer], measure)
                lines.append(Row(cell, measure, kind, peer, spread(values), theirs, ratio, cpu, aim, verdict))
        limit = measure.aims.get(LIMIT)
        if limit is not None:
            verdict = verdict_on_limit(spread(values), limit)
            lines.append(Row(cell, measure, LIMIT, LIMIT, spread(values), None, None, None, limit, verdict))
    return lines


def _cpu_ratio(own: Rounds, peer: Rounds, measure: Measure) -> float | None:
    if measure.cpu is None:
        return None
    found = ratios(own, peer, Measure(measure.cpu, "", "lower"))
    return statistics.median(found) if found else None
