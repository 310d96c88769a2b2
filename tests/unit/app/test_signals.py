"""Stop signals: one end however many come at once, and a way out of an end that hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from fleecer.app import runner, signals


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """Keeps the process alive, and tells how it would have ended: status and line."""
    told: list[str] = []
    ended: list[tuple[int, str]] = []
    monkeypatch.setattr(os, "write", lambda fd, data: told.append(data.decode()))
    monkeypatch.setattr(os, "_exit", lambda status: ended.append((status, told.pop())))
    before = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield ended
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_that_come_together_are_one_and_a_later_one_gives_up(
    ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    begun: list[int] = []
    stopper = signals.Stopper(begun.append)
    for _ in range(3):
        stopper(signal.SIGINT)
    clock[0] += signals.GRACE_S * 0.99
    stopper(signal.SIGTERM)
    assert (begun, ends) == ([signal.SIGINT], [])
    clock[0] += signals.GRACE_S
    stopper(signal.SIGTERM)
    assert begun == [signal.SIGINT]
    assert ends == [(1, "fleecer: stopped again: giving up at once\n")]


def test_a_signal_before_there_is_anything_to_undo_ends_the_process_with_one_line(ends: list[tuple[int, str]]) -> None:
    signals.end_at_once()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGHUP)
    assert ends == [(130, "fleecer: interrupted\n"), (129, "fleecer: interrupted by SIGHUP\n")]


def test_a_signal_that_was_ignored_from_the_start_stays_ignored(ends: list[tuple[int, str]]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.end_at_once()
    signals.raise_interrupted()

    async def hear() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0)

    signal.raise_signal(signal.SIGHUP)
    runner.run(hear())
    assert ends == []


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_cancels_what_runs_which_then_ends_undisturbed(
    ends: list[tuple[int, str]], number: signal.Signals
) -> None:
    undone: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient hand
            for _ in range(10):
                await asyncio.sleep(0)
            undone.append("all")

    with pytest.raises(signals.Interrupted) as caught:
        runner.run(work())
    assert (undone, caught.value.status) == (["all"], 128 + number)
    signal.raise_signal(signal.SIGTERM)
    assert ends == [], "the first signal's grace goes on after the loop"


class SignalledLoop(asyncio.SelectorEventLoop):
    """A stop signal comes in the middle of its making, or of its closing, by `when`."""

    when = ""
    made: SignalledLoop

    def __init__(self) -> None:
        super().__init__()
        type(self).made = self
        if self.when == "making":
            signal.raise_signal(signal.SIGTERM)

    async def shutdown_asyncgens(self) -> None:
        if self.when == "closing":
            signal.raise_signal(signal.SIGTERM)
        await super().shutdown_asyncgens()


@pytest.mark.parametrize(("when", "done"), [("making", []), ("closing", ["all"])])
def test_a_signal_while_the_loop_is_made_or_closed_interrupts_once_it_is_closed(
    ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch, when: str, done: list[str]
) -> None:
    worked: list[str] = []

    async def work() -> None:
        worked.append("all")

    monkeypatch.setattr(SignalledLoop, "when", when)
    monkeypatch.setattr(runner, "loop_factory", lambda: SignalledLoop)
    signals.raise_interrupted()
    with pytest.raises(signals.Interrupted) as caught:
        runner.run(work())
    assert (worked, caught.value.status, SignalledLoop.made.is_closed()) == (done, 143, True)
    signal.raise_signal(signal.SIGTERM)
    assert ends == [], "the first signal's grace goes on after the loop"


def test_signals_do_after_a_run_what_they_did_before(ends: list[tuple[int, str]]) -> None:
    signals.raise_interrupted()
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    runner.run(asyncio.sleep(0))
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_after_an_end_that_a_signal_is_the_usual_way_to_signals_mean_nothing(ends: list[tuple[int, str]]) -> None:
    async def serve() -> str:
        return "served"

    assert runner.run(serve(), ends_in_order=True) == "served"
    for number in signals.STOP_SIGNALS:
        assert signal.getsignal(number) is signal.SIG_IGN


def test_an_interruption_where_nothing_can_be_raised_is_not_lost(
    ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.unraisablehook", None)
    signals.raise_interrupted()

    class Interruptible:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    del_me = Interruptible()
    del del_me
    assert ends == [(143, "fleecer: interrupted by SIGTERM\n")]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_signal_in_the_last_step_is_not_lost(monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.setenv(runner.LOOP_VARIABLE, loop)

    async def main() -> None:
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(signals.Interrupted):
        runner.run(main())
