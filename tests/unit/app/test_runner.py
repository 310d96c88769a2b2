"""Which event loop runs, and what ends with it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fleecer.app import runner
from fleecer.errors import UsageError
from fleecer.storage.lanes import Lane
from fleecer.storage.pool import running_pool


@pytest.mark.parametrize(("wanted", "module"), [("asyncio", "asyncio"), ("uvloop", "uvloop"), ("", "uvloop")])
def test_the_loop_is_uvloops_unless_asyncio_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, wanted: str, module: str
) -> None:
    monkeypatch.setenv("FLEECER_LOOP", wanted)

    async def which() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert runner.run(which()).split(".")[0] == module


def test_without_uvloop_the_standard_loop_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEECER_LOOP", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)
    assert runner.loop_factory() is asyncio.new_event_loop
    monkeypatch.setenv("FLEECER_LOOP", "uvloop")
    with pytest.raises(UsageError, match="FLEECER_LOOP is uvloop, which is not installed: pip install uvloop"):
        runner.loop_factory()


def test_an_unknown_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEECER_LOOP", "trio")
    with pytest.raises(UsageError, match="FLEECER_LOOP is 'trio'; it may be asyncio or uvloop"):
        runner.run(asyncio.sleep(0))


def test_the_pools_threads_end_with_the_run() -> None:
    async def main() -> None:
        await running_pool().submit(Lane(), int)

    before = threading.active_count()
    runner.run(main())
    assert threading.active_count() == before
