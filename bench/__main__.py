"""The command line of the benchmark: `python -m bench`."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile

import click

from bench import cells, report, runner, subjects
from bench.figures import BenchError, Row
from bench.process import interruptible
from bench.report import CellResult
from bench.runner import Plan
from bench.works import MiB, Settings
from fleecer.errors import FleecerError, told
from fleecer.units import parse_size

FULL = Settings(run_s=3.0, image_bytes=2048 * MiB, touches=32768)
QUICK = Settings(run_s=0.4, image_bytes=512 * MiB, touches=4096)


@click.command()
@click.option("--quick", is_flag=True, help="The ten most telling cells, in about two minutes.")
@click.option("--list", "listing", is_flag=True, help="Print the cells and do nothing.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Only cells whose name has PATTERN in it; repeatable.")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often each subject's turn comes."
)
@click.option("--run-s", type=click.FloatRange(0.2), help="Seconds of a timed run [default: 3, quick 0.4].")
@click.option("--image-size", metavar="SIZE", help="The image's size [default: 2G, quick 512M].")
@click.option("--dir", "disk_directory", metavar="DIR", help="Where images on a disk go [default: a temporary place].")
@click.option("--tmpfs", default="/dev/shm", show_default=True, metavar="DIR", help="Where images on tmpfs go.")  # noqa: S108
@click.option(
    "--qsd", multiple=True, metavar="COMMAND", help="A qemu-storage-daemon; repeatable [default: $QSD, or PATH's]."
)
@click.option("--fleecer", metavar="COMMAND", help="Another Fleecer to measure [default: this one].")
@click.option("--out", default="build/bench", show_default=True, metavar="DIR", help="Where results go.")
@click.option("--document", metavar="FILE", help="Put the table and the chart into this Markdown file too.")
def main(
    quick: bool,
    listing: bool,
    only: tuple[str, ...],
    rounds: int,
    run_s: float | None,
    image_size: str | None,
    disk_directory: str | None,
    tmpfs: str,
    qsd: tuple[str, ...],
    fleecer: str | None,
    out: str,
    document: str | None,
) -> None:
    """Measure Fleecer and its peers side by side; print and save ratios with their spread."""
    wanted = cells.chosen(cells.all_cells(), only, quick)
    if not wanted:
        raise click.ClickException("no cell has such a name; --list shows them")
    if listing:
        for cell in wanted:
            click.echo(cell.name)
        return
    interruptible()
    base = QUICK if quick else FULL
    directory = disk_directory or tempfile.gettempdir()
    try:
        size = parse_size(image_size) if image_size else base.image_bytes
        settings = Settings(run_s or base.run_s, size, min(base.touches, size // (64 << 10)))
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        found = subjects.find(fleecer, qsd or _from_environment(), directory)
        if quick:
            found = [subject for subject in found if subject.family != "floor"]  # the table has no room for it
        plan = Plan(wanted, found, rounds, settings, {"disk": directory, "tmpfs": tmpfs}, os.path.abspath(out))
        facts = runner.gather_facts(plan, directory)
        results = runner.run(plan, facts, _progress)
    except (BenchError, FleecerError, OSError) as error:
        raise click.ClickException(told(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted; what was done is in {out}") from None
    _tell(results, facts, quick, out)
    if document is not None:
        _publish(document, results, facts, quick, out)
    if any(result.failures for result in results):
        sys.exit(1)


def _from_environment() -> tuple[str, ...]:
    """QSD: commands, with semicolons between them; without it the qemu-storage-daemon on PATH."""
    named = tuple(part.strip() for part in os.environ.get("QSD", "").split(";") if part.strip())
    return named or ("qemu-storage-daemon",)


def _progress(line: str) -> None:
    """One line that is written over on a terminal; elsewhere one a cell would be no help."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{line[:columns]}")
        sys.stderr.flush()


def _rows(results: list[CellResult], quick: bool) -> list[Row]:
    return report.headlines(results) if quick else [row for result in results for row in result.rows()]


def _tell(results: list[CellResult], facts: dict[str, str], quick: bool, out: str) -> None:
    _progress("")
    click.echo(report.facts_text(facts))
    click.echo()
    click.echo(report.plain(_rows(results, quick)))
    click.echo(f"\nabove 1x Fleecer is better; every figure of every round: {os.path.join(out, 'results.json')}")
    for result in results:
        for failure in result.failures:
            click.echo(f"bench: {result.cell}: {failure}", err=True)


def _publish(document: str, results: list[CellResult], facts: dict[str, str], quick: bool, out: str) -> None:
    """Puts the run into a document, between its marks, with the chart as a file beside it."""
    picture = f"{os.path.splitext(document)[0].lower()}.svg"
    shutil.copyfile(os.path.join(out, "chart.svg"), picture)
    part = "\n\n".join(
        [
            report.facts_text(facts),
            report.markdown(_rows(results, quick)),
            f"![Ratios against the best qemu-storage-daemon]({os.path.basename(picture)})",
        ]
    )
    try:
        with open(document, encoding="utf-8") as file:
            text = report.with_part(file.read(), part)
        with open(document, "w", encoding="utf-8") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{document}: {told(error)}") from None


if __name__ == "__main__":
    main(prog_name="python -m bench")
