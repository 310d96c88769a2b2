"""The table and the documents made from a run's results: text for a terminal, Markdown, JSON, a part of a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures import LIMIT, Measure, Row, Samples, rows

BEGIN = "<!-- bench: begin -->"
END = "<!-- bench: end -->"

_HEAD = ("cell", "measure", "Fleecer", "peer", "its figure", "ratio", "worst..best", "CPU", "aim", "verdict")


@dataclasses.dataclass
class CellResult:
    """What a cell gave. `failures` are lines that say which subject failed in which round, and why."""

    cell: str
    measures: tuple[Measure, ...]
    samples: dict[str, list[dict[str, float] | None]]
    failures: list[str]
    headline: str | None = None

    def rows(self) -> list[Row]:
        """The cell's lines."""
        samples: Samples = self.samples
        return rows(self.cell, self.measures, samples)


def table(lines: Sequence[Row]) -> list[tuple[str, ...]]:
    """The head, then a tuple of texts per row."""
    return [_HEAD, *(_texts(row) for row in lines)]


def headlines(results: Sequence[CellResult]) -> list[Row]:
    """The most telling rows: of each cell that has a headline measure, its row with an aim, or else its first."""
    chosen: list[Row] = []
    for result in results:
        mine = [row for row in result.rows() if row.measure.name == result.headline]
        if mine:
            chosen.append(next((row for row in mine if row.aim is not None), mine[0]))
    return chosen


def plain(lines: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = table(lines)
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def markdown(lines: Sequence[Row]) -> str:
    """The table for a document."""
    head, *body = table(lines)
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def facts_text(facts: Mapping[str, str]) -> str:
    """Machine, versions, date and parameters, a line each."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def document(results: Sequence[CellResult], facts: Mapping[str, str]) -> dict[str, Any]:
    """All that a run found, for JSON: every sample of every round, and the rows made of them."""
    return {
        "facts": dict(facts),
        "cells": [
            {
                "cell": result.cell,
                "samples": result.samples,
                "failures": result.failures,
                "rows": [_record(row) for row in result.rows()],
            }
            for result in results
        ],
    }


def with_part(text: str, part: str) -> str:
    """`text` with what stands between its two marks replaced. Raises ValueError where the marks are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document lacks the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{part}\n{END}{after}"


def number(value: float) -> str:
    """Three digits that count, and no more."""
    if value >= 1_000_000:
        return f"{value / 1_000_000:.3g} M"
    if value >= 10_000:
        return f"{value / 1000:.0f} k"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _texts(row: Row) -> tuple[str, ...]:
    measure = row.measure
    aim = (
        "" if row.aim is None else f"< {number(row.aim)} {measure.unit}" if row.against == LIMIT else f">= {row.aim:g}x"
    )
    if row.ratio is not None:
        ratio, ends = f"{row.ratio.median:.2f}x", f"{row.ratio.low:.2f}..{row.ratio.high:.2f}"
    else:
        ratio, ends = "", f"{number(row.own.low)}..{number(row.own.high)}"
    return (
        row.cell,
        measure.name,
        f"{number(row.own.median)} {measure.unit}".strip(),
        "" if row.against == LIMIT else row.peer,
        "" if row.peer_median is None else number(row.peer_median),
        ratio,
        ends,
        "" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}x",
        aim,
        row.verdict,
    )


def _record(row: Row) -> dict[str, Any]:
    record = dataclasses.asdict(row)
    record["measure"] = row.measure.name
    record["unit"] = row.measure.unit
    return record
