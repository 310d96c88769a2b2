"""What fio is told, and what is read from its report and logs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench import fio
from bench.figures import BenchError


def report(**changes: Any) -> str:
    side = {
        "total_ios": 3000,
        "io_bytes": 3000 * 4096,
        "runtime": 1500,
        "clat_ns": {"max": 9_000_000, "percentile": {"50.000000": 120_000, "99.000000": 450_000}},
    }
    idle = {"total_ios": 0, "io_bytes": 0, "runtime": 0, "clat_ns": {"max": 0}}
    group = {"error": 0, "read": idle, "write": side} | changes
    return "fio: connected to NBD server\n" + json.dumps({"jobs": [group]})


def test_a_report_gives_rates_and_latencies_in_microseconds() -> None:
    result = fio.parse(report())
    assert (result.requests, result.rate, result.p50_us, result.p99_us, result.max_us) == (3000, 2000, 120, 450, 9000)
    assert result.mib_rate == pytest.approx(7.8125)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (report(error=5), "Input/output error"),
        (report(write={"total_ios": 0, "runtime": 0}), "did nothing"),
        ("nothing", "cannot be read"),
        ('{"jobs": []}', "cannot be read"),
    ],
)
def test_a_failed_run_is_no_result(text: str, problem: str) -> None:
    with pytest.raises(BenchError, match=problem):
        fio.parse(text)


def test_jobs_of_one_run_are_reported_as_one() -> None:
    line = fio.command("fio", "report.json", [["--rw=read"], ["--rw=write"]])
    assert line.index("--group_reporting") < line.index("--name=guest0")
    assert line[-4:] == ["--name=guest0", "--rw=read", "--name=guest1", "--rw=write"]


def test_a_touch_list_meets_each_cluster_once_in_an_order_that_stays_the_same() -> None:
    ranges = fio.touch_list(1 << 20, 65536, 4096, 16)
    assert sorted(ranges) == [(index * 65536, 4096) for index in range(16)]
    assert ranges != sorted(ranges)
    assert ranges == fio.touch_list(1 << 20, 65536, 4096, 16)
    with pytest.raises(ValueError, match="do not fit"):
        fio.touch_list(1 << 20, 65536, 4096, 17)


def test_a_request_list_is_what_fio_replays() -> None:
    lines = fio.request_list([(65536, 4096), (0, 512)]).splitlines()
    assert lines[0] == "fio version 2 iolog"
    assert lines[3:5] == ["guest write 65536 4096", "guest write 0 512"]


def test_a_request_list_ends_with_its_first_requests_which_may_get_lost() -> None:
    ranges = [(index * 4096, 4096) for index in range(1000)]
    writes = fio.request_list(ranges).splitlines()[3:]
    assert len(writes) == 1000 + fio.PADDING
    assert writes[1000:] == writes[: fio.PADDING]


def log(*entries: tuple[float, float]) -> str:
    """Lines of requests: when they ended, in milliseconds, and how long they took, in milliseconds."""
    return "".join(f"{ended:.0f}, {taken * 1e6:.0f}, 1, 4096, 0\n" for ended, taken in entries)


def test_the_longest_wait_across_an_instant_is_of_requests_in_flight_then() -> None:
    found = fio.longest_across(log((900, 1), (998, 7), (1015, 14), (1100, 50)), begin_ms=1000, end_ms=1005)
    assert found is not None
    assert (found.across_us, found.before_us) == (14_000, 7_000)


@pytest.mark.parametrize("entries", [[(900, 1), (1003, 4)], [(1003, 4), (1100, 1)], [(900, 1), (1100, 1)]])
def test_a_guest_that_did_not_write_before_across_and_after_tells_nothing(entries: list[tuple[float, float]]) -> None:
    assert fio.longest_across(log(*entries), begin_ms=1000, end_ms=1005) is None
