"""Ratios, their spread, and what is said of them."""

from __future__ import annotations

import pytest
from bench.figures import (
    LIMIT,
    Figures,
    Measure,
    Spread,
    best,
    ratios,
    rows,
    spread,
    verdict_on_limit,
    verdict_on_ratio,
)

RATE = Measure("rate", "/s", aims={"qsd": 2.0}, cpu="cpu")
WAIT = Measure("wait", "ms", "lower", {LIMIT: 5.0})


def rounds(*values: float, name: str = "rate") -> list[Figures | None]:
    return [{name: value} for value in values]


def test_ratios_are_taken_within_a_round_and_above_1_is_better() -> None:
    assert ratios(rounds(20, 10), rounds(10, 20), RATE) == [2.0, 0.5]
    assert ratios(rounds(20, 10, name="wait"), rounds(10, 20, name="wait"), WAIT) == [0.5, 2.0]


def test_a_round_that_failed_on_one_side_does_not_count() -> None:
    assert ratios([{"rate": 8}, None, {"rate": 9}], [None, {"rate": 2}, {"rate": 3}], RATE) == [3.0]


def test_the_best_of_a_family_is_the_one_with_the_better_median() -> None:
    samples = {"fleecer": rounds(9), "qsd 7.2": rounds(1, 5, 99), "qsd 10.0": rounds(6, 6, 6), "floor": rounds(100)}
    assert best(samples, RATE, "qsd") == "qsd 10.0"
    lower = {name: [{"wait": run["rate"]} for run in values if run] for name, values in samples.items()}
    assert best(lower, WAIT, "qsd") == "qsd 7.2"
    assert best(samples, RATE, "nbdkit") is None


@pytest.mark.parametrize(
    ("low", "high", "aim", "verdict"),
    [
        (2.0, 3.0, 2.0, "met"),
        (1.9, 3.0, 2.0, "unclear"),
        (1.2, 1.9, 2.0, "missed"),
        (1.2, 1.9, None, "better"),
        (0.9, 1.9, None, "unclear"),
        (0.5, 0.9, None, "worse"),
        (0.97, 1.03, None, "level"),
        (0.97, 1.03, 1.0, "unclear"),
    ],
)
def test_rounds_on_both_sides_of_the_line_are_called_unclear(
    low: float, high: float, aim: float | None, verdict: str
) -> None:
    assert verdict_on_ratio(Spread((low + high) / 2, low, high, 5), aim) == verdict


def test_a_limit_is_met_only_when_every_round_stays_below_it() -> None:
    assert verdict_on_limit(spread([1, 2, 4.9]), 5) == "met"
    assert verdict_on_limit(spread([1, 2, 5]), 5) == "unclear"
    assert verdict_on_limit(spread([6, 7]), 5) == "missed"


def test_rows_compare_with_each_family_that_was_there_and_with_the_limit() -> None:
    samples = {
        "fleecer": [{"rate": 30.0, "cpu": 2.0, "wait": 1.0}],
        "qsd 7.2": [{"rate": 10.0, "cpu": 8.0}],
        "floor": [{"rate": 60.0}],
    }
    found = rows("cell", [RATE, WAIT], samples)
    assert [(row.measure.name, row.against, row.verdict) for row in found] == [
        ("rate", "qsd", "met"),
        ("rate", "floor", "-"),
        ("wait", LIMIT, "met"),
    ]
    assert found[0].ratio == Spread(3.0, 3.0, 3.0, 1)
    assert found[0].cpu_ratio == 4.0
    assert found[1].cpu_ratio is None


def test_a_cell_in_which_fleecer_failed_has_no_rows() -> None:
    assert rows("cell", [RATE], {"fleecer": [None], "qsd 7.2": rounds(1)}) == []


def test_no_values_have_no_spread() -> None:
    with pytest.raises(ValueError, match="at least one"):
        spread([])
