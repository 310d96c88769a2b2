"""Two disks cut at one instant, searched; and that the search finds what would break it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fleecer.block.fleecing import Fleece, Plan, cut
from fleecer.block.graph import Graph
from fleecer.testing.sim.oracle import Violation
from fleecer.testing.sim.together import run_together

SEEDS = 100


def test_two_disks_are_cut_at_one_instant() -> None:
    in_time = sum(run_together(seed) for seed in range(SEEDS))
    assert in_time > SEEDS  # most cuts were made while writes went on


def test_disks_cut_one_after_the_other_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_by_one(graph: Graph, plans: Sequence[Plan], *, timeout_s: float) -> list[Fleece]:
        return [fleece for plan in plans for fleece in await cut(graph, [plan], timeout_s=timeout_s)]

    monkeypatch.setattr("fleecer.testing.sim.together.cut", one_by_one)
    with pytest.raises(Violation, match="on the first disk"):
        sum(map(run_together, range(SEEDS)))
