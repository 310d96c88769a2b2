"""The run: cells in turn, rounds in turn, subjects in turn, and results that are on disk after every cell.

The order of subjects moves on by one each round, so that nobody always comes first. A run that fails is written down
with its cause and the rest goes on. However it ends, images, sockets and processes are gone.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench import chart, report
from bench.cells import Cell
from bench.figures import BenchError, Figures
from bench.images import Images
from bench.process import call
from bench.report import CellResult
from bench.subjects import Subject
from bench.works import Place, Settings, Stand
from fleecer import __version__
from fleecer.errors import FleecerError, told
from fleecer.units import format_size

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run, where, how often; results go to `output`."""

    cells: Sequence[Cell]
    subjects: Sequence[Subject]
    rounds: int
    settings: Settings
    places: Mapping[Place, str]
    output: str


def run(plan: Plan, facts: Mapping[str, str], progress: Progress) -> list[CellResult]:
    """Does all cells. Raises BenchError only where nothing can be done at all; results are saved cell by cell."""
    results: list[CellResult] = []
    os.makedirs(plan.output, exist_ok=True)
    for place in plan.places:
        mine = [cell for cell in plan.cells if cell.place == place]
        if not mine:
            continue
        with contextlib.ExitStack() as stack:
            there = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleecer-bench-", dir=plan.places[place]))
            sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleecer-bench-"))
            here = Images(there, plan.settings.image_bytes)
            stack.callback(here.close)
            stand = Stand(plan.settings, here, sockets)
            for cell in mine:
                head = f"[{len(results) + 1}/{len(plan.cells)}] {cell.name}"
                results.append(run_cell(cell, plan, stand, head, progress))
                save(plan.output, results, facts)
    return results


def run_cell(cell: Cell, plan: Plan, stand: Stand, head: str, progress: Progress) -> CellResult:
    """All rounds of one cell."""
    subjects = [subject for subject in plan.subjects if subject.family in cell.families]
    samples: dict[str, list[Figures | None]] = {subject.name: [] for subject in subjects}
    result = CellResult(cell.name, cell.measures, samples, [], cell.headline)
    for number in range(plan.rounds):
        for subject in turns(subjects, number):
            progress(f"{head}: round {number + 1} of {plan.rounds}, {subject.name}")
            begun = time.perf_counter()
            try:
                figures = cell.work.run(stand, subject)
                samples[subject.name].append(figures | {"took": time.perf_counter() - begun})
            except (BenchError, FleecerError, OSError) as error:
                samples[subject.name].append(None)
                result.failures.append(f"{subject.name}, round {number + 1}: {told(error)}")
    return result


def turns(subjects: Sequence[Subject], number: int) -> list[Subject]:
    """The order of subjects in a round."""
    first = number % len(subjects) if subjects else 0
    return [*subjects[first:], *subjects[:first]]


def save(directory: str, results: Sequence[CellResult], facts: Mapping[str, str]) -> None:
    """Writes results.json, table.md and chart.svg, each whole or not at all."""
    rows = [row for result in results for row in result.rows()]
    _write(directory, "results.json", json.dumps(report.document(results, facts), indent=1) + "\n")
    _write(directory, "table.md", f"{report.facts_text(facts)}\n\n{report.markdown(rows)}\n")
    _write(directory, "chart.svg", chart.svg(rows, title(facts)))


def title(facts: Mapping[str, str]) -> str:
    """What the chart is called."""
    return f"Fleecer against the best qemu-storage-daemon ({facts.get('date', '')}); right of 1x Fleecer is better"


def gather_facts(plan: Plan, directory: str) -> dict[str, str]:
    """Machine, versions, date, parameters: what a reader must know to judge the figures."""
    release = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown system")
    places = ", ".join(
        f"{place}: {call(['/usr/bin/stat', '-f', '-c', '%T', path], directory).strip()}"
        for place, path in plan.places.items()
    )
    others = ", ".join(subject.name for subject in plan.subjects if subject.family in ("qsd", "nbdkit"))
    clients = ", ".join(
        call([found, "--version"], directory).splitlines()[0]
        for name in ("fio", "nbdcopy", "qemu-img")
        if (found := shutil.which(name))
    )
    size = format_size(plan.settings.image_bytes)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} x {_processor()}, {format_size(_memory_bytes())} of memory",
        "system": f"{release}, Linux {platform.release()}, {places}",
        "Fleecer": f"{__version__}, Python {platform.python_version()}, {_event_loop()}",
        "peers": others,
        "clients": clients,
        "run": f"{plan.rounds} rounds, {plan.settings.run_s:g} s each, image of {size}",
    }


def _event_loop() -> str:
    try:
        return f"uvloop {importlib.metadata.version('uvloop')}"
    except importlib.metadata.PackageNotFoundError:
        return "asyncio"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _write(directory: str, name: str, text: str) -> None:
    hidden = os.path.join(directory, f".{name}")
    with open(hidden, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(hidden, os.path.join(directory, name))
