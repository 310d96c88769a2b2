"""How far copying is: one line that is drawn over on a terminal, a line now and then elsewhere, nothing if silent.

All of it goes to standard error; standard output is for results. Progress that cannot be shown is no reason to fail.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
from typing import Protocol, Self

from fleecer.cli.output import duration
from fleecer.errors import quoted
from fleecer.units import format_size

LINE_INTERVAL_S = 10.0
DRAW_INTERVAL_S = 0.1
RATE_AFTER_S = 1.0
"""How long a phase must have gone on before its rate says something."""

_BAR_MAX = 30
_BAR_MIN = 8


class Amount(Protocol):
    """What is to be read, and what has been."""

    data: int
    read: int


class Meter:
    """Shows the progress of one piece of work after another. A context manager."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._draws = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown: tuple[str, str] | None = None
        self._drawn = 0  # characters of the line that the terminal's cursor is in
        self._begun_s = 0.0
        self._next_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.end_line()

    def show(self, what: str, phase: str, amount: Amount) -> None:
        """Tells that `what` ("web") is in `phase` ("copying"), `amount` far."""
        if self._silent:
            return
        now_s = time.monotonic()
        is_new = self._shown != (what, phase)
        if is_new:
            self.end_line()
            self._shown, self._begun_s = (what, phase), now_s
        elif now_s < self._next_s and (not self._draws or amount.read < amount.data):
            return
        self._next_s = now_s + (DRAW_INTERVAL_S if self._draws else LINE_INTERVAL_S)
        head = f"{what if what.isprintable() else quoted(what)}: {phase}"
        tail = describe(amount, now_s - self._begun_s)
        if not self._draws:
            _write(f"{head}, {tail}\n")
            return
        line = draw(head, amount, tail, _columns())
        _write("\r" + line.ljust(self._drawn))
        self._drawn = len(line)

    def end_line(self) -> None:
        """Leaves the line that is being drawn, so that something else can be written."""
        if self._drawn:
            _write("\n")
            self._drawn = 0


def describe(amount: Amount, seconds: float) -> str:
    """How far it is after `seconds`, in words: done, rate, and how long it will take from here."""
    text = f"{format_size(amount.read)} of {format_size(amount.data)}"
    if seconds < RATE_AFTER_S or not amount.read:
        return text
    rate = amount.read / seconds
    left = "" if amount.read >= amount.data else f", {duration(int((amount.data - amount.read) / rate) + 1)} left"
    return f"{text}, {format_size(rate)}/s{left}"


def draw(head: str, amount: Amount, tail: str, columns: int) -> str:
    """One line with a bar if there is room for it, shorter than `columns` in any case."""
    share = min(amount.read / amount.data, 1.0) if amount.data else 1.0
    percent = f"{share:4.0%}"
    room = min(columns - 1 - len(f"{head} [] {percent} {tail}"), _BAR_MAX)
    if room >= _BAR_MIN:
        filled = int(room * share)
        return f"{head} [{'#' * filled}{'-' * (room - filled)}] {percent} {tail}"
    return f"{head} {percent} {tail}"[: max(columns - 1, 1)]


def _columns() -> int:
    """The width of the terminal that standard error is."""
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
