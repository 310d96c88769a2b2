"""How far copying is: a bar on a terminal, a line now and then elsewhere, nothing where a document is asked for.

All of it goes to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time
import types
from typing import TYPE_CHECKING, Protocol, Self

from fleecer.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_INTERVAL_S = 10.0


class Amount(Protocol):
    """What is to be read, and what has been."""

    data: int
    read: int


class Meter:
    """Shows the progress of one piece of work after another. A context manager."""

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._shown: tuple[str, str] | None = None
        self._line_at = 0.0

    def __enter__(self) -> Self:
        if not self._silent and sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, phase: str, amount: Amount) -> None:
        """Tells that `what` ("web") is in `phase` ("copying"), `amount` far."""
        if self._silent:
            return
        is_new = self._shown != (what, phase)
        self._shown = (what, phase)
        if self._bar is not None:
            if is_new or self._task is None:
                self._task = self._bar.add_task(f"{what}: {phase}", total=amount.data)
            self._bar.update(self._task, completed=amount.read, total=amount.data)
            return
        now = time.monotonic()
        if is_new or now >= self._line_at:
            self._line_at = now + LINE_INTERVAL_S
            sys.stderr.write(f"{what}: {phase}, {format_size(amount.read)} of {format_size(amount.data)}\n")


def _bar() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
