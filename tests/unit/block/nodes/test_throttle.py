"""The throttle filter: the bucket's arithmetic, and which requests pay."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecer.block.edge import Edge
from fleecer.block.nodes.throttle import LeakyBucket, ThrottleNode
from fleecer.errors import UsageError
from fleecer.testing.memory import MemoryNode


@given(
    rate=st.floats(1, 1e6),
    burst=st.floats(0, 1e6),
    requests=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e6)), min_size=1, max_size=30),
)
def test_a_bucket_never_lets_through_more_than_rate_and_burst(
    rate: float, burst: float, requests: list[tuple[float, float]]
) -> None:
    bucket = LeakyBucket(rate, burst)
    now_s = 0.0
    starts: list[tuple[float, float]] = []
    for gap_s, amount in requests:
        now_s += gap_s
        starts.append((bucket.pour(amount, now_s), amount))
    times = [start_s for start_s, _ in starts]
    assert times == sorted(times), "requests start in the order they came"
    for first in range(len(starts)):
        poured = 0.0
        for start_s, amount in starts[first:]:
            # When a request starts, what came before it has drained down to the burst.
            assert poured <= rate * (start_s - times[first]) + burst + 1e-6 * (1 + poured)
            poured += amount


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=20))
def test_a_busy_bucket_uses_its_whole_rate(amounts: list[float]) -> None:
    bucket = LeakyBucket(100.0)
    starts = [bucket.pour(amount, 0.0) for amount in amounts]
    for index, start_s in enumerate(starts):
        assert start_s == pytest.approx(sum(amounts[:index]) / 100.0)


def test_a_bucket_needs_a_rate() -> None:
    with pytest.raises(UsageError, match="throttle rate 0 and burst 1"):
        LeakyBucket(0, 1)
    with pytest.raises(UsageError):
        LeakyBucket(1, -1)


async def slept_by(node: ThrottleNode, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What each of the six operations waits, in turn, with the clock standing still."""
    slept: list[float] = [0.0]

    async def sleep(delay_s: float) -> None:
        slept[-1] = delay_s

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
    for request in (
        node.pread(0, 1000),
        node.pwrite(0, bytes(1000)),
        node.zero(0, 1000),
        node.discard(0, 1000),
        node.flush(),
        node.block_status(0, 1000),
    ):
        await request
        slept.append(0.0)
    monkeypatch.undo()
    return [round(wait_s, 6) for wait_s in slept[:-1]]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"bytes_per_second": 1000}, [0, 1, 2, 3, 0, 0]),
        ({"requests_per_second": 10}, [0, 0.1, 0.2, 0.3, 0, 0]),
        ({"bytes_per_second": 1000, "burst_bytes": 1500}, [0, 0, 0.5, 1.5, 0, 0]),
        ({"requests_per_second": 10, "burst_requests": 2}, [0, 0, 0, 0.1, 0, 0]),
        ({"bytes_per_second": 1000, "requests_per_second": 0.5}, [0, 2, 4, 6, 0, 0]),
        ({}, [0, 0, 0, 0, 0, 0]),
    ],
)
async def test_reads_and_changes_pay_for_requests_and_bytes(
    limits: dict[str, float], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Edge(MemoryNode("disk0", 8192), "node 'throttle0'", "file", writable=True)
    assert await slept_by(ThrottleNode("throttle0", child, **limits), monkeypatch) == expected
