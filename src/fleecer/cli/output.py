"""What commands print: tables for people, one JSON document for programs, and what is wrong in one line."""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Sequence
from typing import Any

import click


def print_json(document: dict[str, Any]) -> None:
    """Prints the document, the only thing on standard output."""
    import json  # some milliseconds, which only those pay who print one

    click.echo(json.dumps(document, indent=2))


def print_error(message: str) -> None:
    """Prints one line on standard error. Where it cannot, that is no reason to fail."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"fleecer: {' '.join(message.split())}\n")
            sys.stderr.flush()


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their longest entry."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        click.echo("  ".join(entry.ljust(width) for entry, width in zip(line, widths, strict=True)).rstrip())


def age(created: str, now: datetime.datetime) -> str:
    """How long ago a moment in ISO 8601 was."""
    return duration(max(0, int((now - datetime.datetime.fromisoformat(created)).total_seconds())))


def duration(seconds: int) -> str:
    """A time in its two largest units: "3 d 4 h", "12 s"."""
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, seconds = divmod(seconds, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2])
