"""Run to completion: coroutines that need not wait end at once, the others become tasks that behave like any."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop

from fleecer import eager


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> asyncio.Runner:
    """A runner on either loop; a test's body goes into its `run`."""
    factory: Callable[[], asyncio.AbstractEventLoop] = request.param
    return asyncio.Runner(loop_factory=factory)


def test_what_need_not_wait_ends_at_once(runner: asyncio.Runner) -> None:
    async def main() -> None:
        done = []

        async def work() -> None:
            done.append(1)

        assert eager.start(work()) is None
        assert done == [1]

    with runner:
        runner.run(main())


def test_what_it_raises_at_once_is_raised_here_and_what_later_is_the_tasks(runner: asyncio.Runner) -> None:
    async def main() -> None:
        async def fail(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            raise ValueError(turns)

        with pytest.raises(ValueError, match="0"):
            eager.start(fail(0))
        task = eager.start(fail(2))
        assert task is not None
        with pytest.raises(ValueError, match="2"):
            await task

    with runner:
        runner.run(main())


def test_any_number_may_wait_for_one_future(runner: asyncio.Runner) -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        results: list[int] = []

        async def wait() -> None:
            results.append(await future)
            await asyncio.sleep(0)
            results.append(await future)

        tasks = [eager.start(wait()) for _ in range(3)]
        plain = [asyncio.ensure_future(wait()) for _ in range(2)]
        await asyncio.sleep(0)
        tasks.append(eager.start(wait()))
        asyncio.get_running_loop().call_soon(future.set_result, 7)
        await asyncio.gather(*(task for task in tasks if task is not None), *plain)
        assert results == [7] * 12

    with runner:
        runner.run(main())


def test_a_future_that_is_done_before_the_task_first_runs_is_waited_for_all_the_same(runner: asyncio.Runner) -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            assert await future == 7

        task = eager.start(wait())
        future.set_result(7)
        assert task is not None
        await task

    with runner:
        runner.run(main())


def test_a_failed_future_raises_where_it_is_awaited(runner: asyncio.Runner) -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        seen: list[str] = []

        async def wait() -> None:
            try:
                await future
            except ValueError as error:
                seen.append(str(error))
            await asyncio.sleep(0)  # and it goes on

        tasks = [eager.start(wait()) for _ in range(2)]
        future.set_exception(ValueError("broken"))
        await asyncio.gather(*(task for task in tasks if task is not None))
        assert seen == ["broken", "broken"]

    with runner:
        runner.run(main())


def test_a_cancel_reaches_the_coroutine_where_it_waits(runner: asyncio.Runner) -> None:
    async def main() -> None:
        cleaned = []

        async def wait() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await asyncio.sleep(0)
                cleaned.append(1)

        for turns in (0, 1):
            task = eager.start(wait())
            assert task is not None
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert cleaned == [1, 1]

    with runner:
        runner.run(main())


def test_a_waiting_task_is_kept_alive_until_it_ends(runner: asyncio.Runner) -> None:
    async def main() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            await future

        before = len(eager._waiting)
        eager.start(wait())
        assert len(eager._waiting) == before + 1
        future.set_result(None)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(eager._waiting) == before

    with runner:
        runner.run(main())
