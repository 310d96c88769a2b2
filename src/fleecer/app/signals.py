"""The signals that ask the program to stop: SIGINT, SIGTERM, SIGHUP.

The first asks for the end in order. Whatever sends several (a terminal, a service manager, an impatient hand) does so
within moments, so further ones are taken for the first until `GRACE_S` have passed; one after that gives up at once.

Invariants: a signal that the program was started to ignore (nohup, a shell's `&`) stays ignored; from `main` on none
has the system's default effect, up to the exit of the process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing would take longer than all the rest, and the program waits for this module
if TYPE_CHECKING:
    import asyncio
    import types
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

GRACE_S = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A stop signal came, and what was under way has been undone. No `Exception`: nobody may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells give it."""
        return 128 + self.number


class Stopper:
    """What stop signals do: the first calls `begin` with its number; see the module for the others.

    `number` is the first signal's, 0 before it.
    """

    def __init__(self, begin: Callable[[int], object]) -> None:
        self.number = 0
        self._begin = begin
        self._begun_s = 0.0

    def __call__(self, number: int, frame: types.FrameType | None = None) -> None:
        """A signal came; as a handler, or called by an event loop."""
        if not self.number:
            self.number, self._begun_s = int(number), time.monotonic()
            self._begin(self.number)
        elif time.monotonic() - self._begun_s >= GRACE_S:
            _end("stopped again: giving up at once", 1)


def end_at_once() -> None:
    """Stop signals end the process with one line: for when there is nothing to undo yet."""
    _install(_end_interrupted)


def raise_interrupted() -> None:
    """The first stop signal raises `Interrupted` in the main thread, wherever that is."""
    _install(Stopper(_raise))
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """Stop signals have no effect any more: what was asked for is done."""
    _install(signal.SIG_IGN)


@contextlib.contextmanager
def held_for(stopper: Stopper, *, ends_in_order: bool) -> Iterator[None]:
    """Inside, stop signals call `stopper` and nothing else, so that none raises an exception in the middle of the
    making or the closing of an event loop, which would leave it in pieces.

    Afterwards they do what they did before. If one has come they are still the stopper's; or are ignored, where
    a signal is the usual way to end what ran (`ends_in_order`).
    """
    before = {number: signal.getsignal(number) for number in _heeded()}
    _install(stopper)
    try:
        yield
    finally:
        with _blocked():
            for number, handler in before.items():
                after: Any = signal.SIG_IGN if ends_in_order else stopper if stopper.number else handler
                signal.signal(number, after)


@contextlib.contextmanager
def heeded_by(loop: asyncio.AbstractEventLoop, stopper: Stopper) -> Iterator[None]:
    """Inside, stop signals call `stopper` from the running loop, or whatever else is put there by `follow`.

    Afterwards they call `stopper` again, as `held_for` had it.
    """
    heeded = _heeded()
    follow(loop, stopper)
    try:
        yield
    finally:
        # Between the loop's removal of its handler and ours the default is in force; no signal may see that.
        with _blocked():
            for number in heeded:
                loop.remove_signal_handler(number)
                signal.signal(number, stopper)


def follow(loop: asyncio.AbstractEventLoop, stopper: Stopper) -> None:
    """Stop signals call `stopper` from `loop`, until it is closed or told otherwise."""
    for number in _heeded():
        loop.add_signal_handler(number, stopper, number)


def _heeded() -> list[signal.Signals]:
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Stop signals that come inside are delivered afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _install(handler: Any) -> None:
    for number in _heeded():
        signal.signal(number, handler)


def _raise(number: int) -> NoReturn:
    raise Interrupted(number)


def _end_interrupted(number: int, frame: types.FrameType | None = None) -> None:
    interrupted = Interrupted(number)
    _end(str(interrupted), interrupted.status)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """An exception that came where none can be raised, such as a destructor, is dropped; ours must not be."""
    if isinstance(what.exc_value, Interrupted):
        _end_interrupted(what.exc_value.number)
    sys.__unraisablehook__(what)


def _end(line: str, status: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"fleecer: {line}\n".encode())
    os._exit(status)
