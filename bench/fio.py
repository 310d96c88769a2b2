"""fio as the guest: its command line, and what its report and its latency logs say.

One run is one or more jobs at the same time, reported as one. Latencies are those fio calls completion latencies, in
microseconds. A request count and the run's time give the rate; fio's own rate is by bytes, which a replayed list of
requests does not count exactly.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import BenchError
from bench.process import Client

Arguments = Sequence[str]
"""Options of one job, without its name."""

PADDING = 128
"""How many requests of a list are repeated at its end: more than any guest here has in flight on a connection."""


@dataclass(frozen=True)
class Result:
    """What a run did. Times are microseconds where they say so."""

    requests: int
    bytes_moved: int
    seconds: float
    p50_us: float
    p99_us: float
    max_us: float

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds

    @property
    def mib_rate(self) -> float:
        """MiB a second."""
        return self.bytes_moved / self.seconds / (1 << 20)


def command(program: str, report: str, jobs: Sequence[Arguments]) -> list[str]:
    """The command line that runs jobs at once, and puts fio's report in the file `report`."""
    line = [program, "--output-format=json", f"--output={report}", "--group_reporting", "--percentile_list=50:99"]
    for index, arguments in enumerate(jobs):
        line += [f"--name=guest{index}", *arguments]
    return line


def parse(text: str) -> Result:
    """The result in a report. Raises BenchError when it is no report, a job failed, or nothing was done."""
    try:
        group: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        sides = [group["read"], group["write"]]
        if group["error"]:
            raise BenchError(f"fio: a request failed: {os.strerror(group['error'])}")
        side = max(sides, key=lambda one: int(one["total_ios"]))
        if not side["total_ios"] or not side["runtime"]:
            raise BenchError("fio did nothing")
        latency = side["clat_ns"]
        return Result(
            side["total_ios"],
            side["io_bytes"],
            side["runtime"] / 1e3,
            latency["percentile"]["50.000000"] / 1e3,
            latency["percentile"]["99.000000"] / 1e3,
            latency["max"] / 1e3,
        )
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(f"fio's report cannot be read: {error!r}: {text[:80]!r}") from error


class Run:
    """A run under way; `result` waits for its end."""

    def __init__(self, program: str, directory: str, jobs: Sequence[Arguments], name: str = "fio") -> None:
        self._report = os.path.join(directory, f"{name}.json")
        self._client = Client(command(program, self._report, jobs), directory)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._client.running()

    def result(self, timeout_s: float) -> Result:
        """Raises BenchError when it fails or does not end in time."""
        try:
            self._client.finish(timeout_s)
            return self._reported()
        finally:
            self.end()

    def stop(self) -> Result:
        """Ends it before its time; what it did until then. Raises BenchError when it did nothing, or had failed."""
        self._client.end()
        return self._reported()

    def _reported(self) -> Result:
        with open(self._report, encoding="utf-8", errors="replace") as file:
            return parse(file.read())

    def end(self) -> None:
        """Ends it, if it has not ended, and removes its report. Idempotent."""
        self._client.end()
        if os.path.exists(self._report):
            os.unlink(self._report)


def touch_list(size: int, spacing: int, length: int, count: int, seed: int = 1) -> list[tuple[int, int]]:
    """`count` ranges of `length` bytes, one at the head of each of the first `count` pieces of `spacing`, shuffled.

    The order is the same for every subject. Raises ValueError where they do not fit in `size`.
    """
    if (count - 1) * spacing + length > size:
        raise ValueError(f"{count} ranges, {spacing} bytes apart, do not fit in {size} bytes")
    offsets = [index * spacing for index in range(count)]
    random.Random(seed).shuffle(offsets)  # noqa: S311 - an order of requests
    return [(offset, length) for offset in offsets]


def request_list(ranges: Sequence[tuple[int, int]]) -> str:
    """Writes for fio to replay (its log format, version 2); for --read_iolog, together with --filename=guest.

    fio does not wait for the last requests of a list, so the first ones stand at its end once more.
    """
    lines = ["fio version 2 iolog", "guest add", "guest open"]
    lines += [f"guest write {offset} {length}" for offset, length in [*ranges, *ranges[:PADDING]]]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Across:
    """The longest waits, in microseconds, of requests in flight across an instant, and of those done before it."""

    across_us: float
    before_us: float


def longest_across(log: str, begin_ms: float, end_ms: float) -> Across | None:
    """From a latency log with Unix time stamps: None unless requests ended both before and after the time given.

    A line is: when it ended in milliseconds, how long it took in nanoseconds, and more. Stamps are whole milliseconds.
    """
    across = before = 0.0
    ended_after = False
    for line in log.splitlines():
        stamp, taken, *_ = line.split(",")
        ended, taken_us = float(stamp), float(taken) / 1e3
        if ended < begin_ms - 1:
            before = max(before, taken_us)
        elif ended - taken_us / 1e3 <= end_ms + 1:
            across = max(across, taken_us)
        ended_after = ended_after or ended > end_ms + 1
    return Across(across, before) if before and across and ended_after else None
