"""The list of cells: every work, on every format, in every place, with what is measured and aimed at.

The aims are ratios against the better qemu-storage-daemon unless they name another subject, or limits on Fleecer's own
figure. A cell with a headline belongs to the quick run too, and gives one line of its table.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from bench.figures import LIMIT, Measure
from bench.images import Format
from bench.snapshot_works import Copy, Cut, Isolation, SparseBackup, StalledScratch, Tool, Touches
from bench.subjects import Family, SchemeName
from bench.works import Access, Exports, Guest, MappedMemory, Memory, MiB, Place, Status, TiB, Work

PLACES: tuple[Place, ...] = get_args(Place)
FORMATS: tuple[Format, ...] = get_args(Format)
SNAPSHOT_FORMATS: tuple[Format, ...] = ("raw", "qcow2")
SHAPES = ((1, 1), (16, 1), (64, 1), (16, 4))
"""Requests in flight on a connection, and connections."""
DAEMONS: tuple[Family, ...] = ("fleecer", "qsd")


@dataclass(frozen=True)
class Cell:
    """One piece of work in one place. `name` is work/format/place."""

    name: str
    place: Place
    work: Work
    families: tuple[Family, ...]
    measures: tuple[Measure, ...]
    headline: str | None = None


def all_cells() -> list[Cell]:
    """Every cell, those of one place together."""
    found: list[Cell] = []
    for place in PLACES:
        found += _guests(place)
        found += _touches(place)
        found += _copies(place)
        found += _latencies(place)
    found += _cuts()
    found += _large()
    return found


def chosen(cells: Sequence[Cell], patterns: Sequence[str], quick: bool) -> list[Cell]:
    """Those whose name matches a pattern (as of a shell; a part of the name will do), or all without any."""
    wanted = [cell for cell in cells if cell.headline is not None] if quick else list(cells)
    if not patterns:
        return wanted
    return [cell for cell in wanted if any(fnmatch.fnmatchcase(cell.name, f"*{pattern}*") for pattern in patterns)]


def _everyone(kind: Format) -> tuple[Family, ...]:
    """Who can do a guest's work: nbdkit's file plugin and the floor know no qcow2."""
    return ("fleecer", "qsd", "nbdkit", "floor") if kind == "raw" else DAEMONS


def _shape(depth: int, connections: int) -> str:
    return f"depth-{depth}" if connections == 1 else f"{connections}-connections-depth-{depth}"


def _guests(place: Place) -> Iterator[Cell]:
    headlines = {
        ("raw", "randread", 1),
        ("raw", "randread", 16),
        ("raw", "randwrite", 16),
        ("qcow2", "randread", 16),
        ("qcow2", "randwrite", 16),
    }
    random_accesses: tuple[Access, ...] = ("randread", "randwrite")
    for kind in FORMATS:
        for access in random_accesses:
            for depth, connections in SHAPES:
                measure = _requests("requests", "cpu", _small_aim(access == "randread", place, depth))
                headline = place == "disk" and connections == 1 and (kind, access, depth) in headlines
                yield Cell(
                    f"{access}-4k-{_shape(depth, connections)}/{kind}/{place}",
                    place,
                    Guest(kind, access, 4096, depth, connections),
                    _everyone(kind),
                    (measure, Measure("p99", "us", "lower")),
                    "requests" if headline else None,
                )
        if kind != "overlay":
            yield from _flushing(kind, place)
        yield from _sequential(kind, place)


def _flushing(kind: Format, place: Place) -> Iterator[Cell]:
    for depth in (1, 16):
        work = Guest(kind, "randwrite", 4096, depth, flushes=True)
        measure = _requests("requests", "cpu", {"qsd": 1.0})
        yield Cell(f"randwrite-and-flush-4k-depth-{depth}/{kind}/{place}", place, work, _everyone(kind), (measure,))


def _sequential(kind: Format, place: Place) -> Iterator[Cell]:
    accesses: tuple[Access, ...] = ("read", "write")
    for access in accesses:
        for block, name in ((256 << 10, "256k"), (MiB, "1m")):
            aims = {"qsd": 2.0 if access == "read" else 1.5, "nbdkit": 1.0}
            headline = place == "disk" and kind == "raw" and block == MiB
            yield Cell(
                f"{access}-{name}-depth-4/{kind}/{place}",
                place,
                Guest(kind, access, block, 4),
                _everyone(kind),
                (Measure("throughput", "MiB/s", aims=aims, cpu="cpu"),),
                "throughput" if headline else None,
            )
    if place == "disk":
        for access, block, depth in (("read", MiB, 4), ("randread", 4096, 16)):
            measure = (
                Measure("throughput", "MiB/s", aims={"qsd": 1.0, "nbdkit": 1.0}, cpu="cpu")
                if access == "read"
                else _requests("requests", "cpu", {"qsd": 1.0, "nbdkit": 1.0})
            )
            cold = Guest(kind, "read" if access == "read" else "randread", block, depth, cold=True)
            yield Cell(f"cold-{access}/{kind}/{place}", place, cold, _everyone(kind), (measure,))


def _small_aim(read: bool, place: Place, depth: int) -> dict[str, float]:
    if depth == 1:
        return {"qsd": 1.0, "nbdkit": 1.0}
    return {"qsd": 3.0 if read or place == "tmpfs" else 2.0, "nbdkit": 1.0}


def _requests(name: str, cpu: str, aims: dict[str, float]) -> Measure:
    return Measure(name, "/s", aims=aims, cpu=cpu)


def _touches(place: Place) -> Iterator[Cell]:
    schemes: tuple[SchemeName, ...] = get_args(SchemeName)
    for kind in SNAPSHOT_FORMATS:
        for name in schemes:
            for depth, connections in SHAPES:
                aims = {"qsd": _small_aim(False, place, depth)["qsd"]}
                if name == "backup-job-extended" and (depth, connections) != (16, 1):
                    continue
                measures = [_requests(f"{touch} touch", f"{touch} cpu", aims) for touch in ("first", "second")]
                measures += [Measure(f"{touch} p99", "us", "lower") for touch in ("first", "second")]
                telling = place == "disk" and kind == "raw" and name == "snapshot" and (depth, connections) == (16, 1)
                yield Cell(
                    f"{name}-writes-{_shape(depth, connections)}/{kind}/{place}",
                    place,
                    Touches(kind, name, depth, connections),
                    DAEMONS,
                    tuple(measures),
                    "first touch" if telling else None,
                )


def _copies(place: Place) -> Iterator[Cell]:
    tools: tuple[Tool, ...] = get_args(Tool)
    for kind in SNAPSHOT_FORMATS:
        for tool in tools:
            for busy in (False, True):
                headline = (kind, place, tool, busy) == ("raw", "disk", "nbdcopy", False)
                measures = [Measure("copied", "MiB/s", aims={"qsd": 2.0}, cpu="cpu")]
                measures += [Measure("guest", "/s")] if busy else []
                yield Cell(
                    f"{tool}-of-snapshot-{'busy' if busy else 'idle'}/{kind}/{place}",
                    place,
                    Copy(kind, tool, busy),
                    DAEMONS,
                    tuple(measures),
                    "copied" if headline else None,
                )


def _latencies(place: Place) -> Iterator[Cell]:
    for kind in SNAPSHOT_FORMATS:
        measures = [
            Measure(f"{phase} {what}", "us", "lower") for phase in ("quiet", "read", "stalled") for what in _LATENCIES
        ]
        measures += [
            Measure("read/quiet", "times", "lower", {LIMIT: 2.0}),
            Measure("stalled/quiet", "times", "lower", {LIMIT: 1.25}),
        ]
        yield Cell(f"latency-with-readers/{kind}/{place}", place, Isolation(kind), DAEMONS, tuple(measures))
        stalled = Measure("max", "ms", "lower", {LIMIT: 1100.0})
        yield Cell(f"stalled-scratch/{kind}/{place}", place, StalledScratch(kind), DAEMONS, (stalled,))


_LATENCIES = ("p50", "p99", "max")


def _cuts() -> Iterator[Cell]:
    measures = (Measure("cut", "ms", "lower", {LIMIT: 5.0}), Measure("wait", "ms", "lower", {LIMIT: 10.0}))
    for size, name in ((MiB, "1m"), (4 * TiB, "4t")):
        for count in (1, 4, 16):
            for kind in ("raw", "qcow2"):
                work = Cut("raw" if kind == "raw" else "qcow2", count, size)
                headline = "wait" if (size, count, kind) == (4 * TiB, 1, "qcow2") else None
                yield Cell(f"cut-{count}-disks-of-{name}/{kind}/disk", "disk", work, DAEMONS, measures, headline)


def _large() -> Iterator[Cell]:
    yield Cell("map-100k-extents/qcow2/disk", "disk", Status(), DAEMONS, (Measure("map", "ms", "lower", cpu="cpu"),))
    backup = Measure("backup", "s", "lower", cpu="cpu")
    yield Cell("backup-1g-in-1t/qcow2/disk", "disk", SparseBackup(), DAEMONS, (backup,))
    memory = (
        Measure("idle", "MiB", "lower", {LIMIT: 64.0}),
        Measure("clients", "MiB", "lower"),
        Measure("start", "ms", "lower"),
    )
    yield Cell("memory/qcow2/disk", "disk", Memory(), DAEMONS, memory)
    mapped = Measure("mapped", "MiB", "lower", {LIMIT: 256.0})
    yield Cell("memory-4t-mapped/qcow2/disk", "disk", MappedMemory(), DAEMONS, (mapped,))
    exports = (Measure("start", "ms", "lower"), Measure("resident", "MiB", "lower"))
    yield Cell("1000-exports/raw/disk", "disk", Exports(), DAEMONS, exports)
