"""A monitor's sessions: negotiation, order, limits, and their end."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.monitor_world import Monitored
from tests.serving_world import turns

from fleecer.errors import IoError
from fleecer.monitor import registry, server
from fleecer.monitor.registry import Context, command
from fleecer.units import KiB, MiB


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Monitored]:
    made = Monitored(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def gate(world: Monitored, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncio.Event]:
    """A command "x-wait" that waits for this, and some that fail."""
    monkeypatch.setattr(registry, "COMMANDS", dict(registry.COMMANDS))
    event = asyncio.Event()

    @command
    async def x_wait(context: Context) -> dict[str, Any]:
        await event.wait()
        return {}

    @command
    async def x_fail(context: Context, how: str) -> dict[str, Any]:
        if how == "bug":
            raise ZeroDivisionError("division by zero")
        if how == "os":
            raise PermissionError(13, "Permission denied")
        raise IoError(5, "disk", "read", 0, 512)

    @command
    async def x_sum(context: Context, a: int, more_of_it: int = 1) -> int:
        return a + more_of_it

    yield event
    event.set()


async def test_a_session_begins_with_a_greeting_and_negotiation(world: Monitored) -> None:
    client = world.raw_client()
    greeting = await client.message(0)
    version = greeting["QMP"]["version"]
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    assert version["package"].startswith("fleecer-")
    assert greeting["QMP"]["capabilities"] == []
    answer = await client.ask("query-version")
    assert answer["error"] == {
        "class": "CommandNotFound",
        "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
    }
    world.daemon.events.announce("TOO_EARLY", {})
    assert await client.run("qmp_capabilities") == {}
    assert await client.run("query-version") == version
    assert not client.events()


@pytest.mark.parametrize("piece_bytes", [1, 3, 1 << 30])
async def test_commands_need_no_line_ends_and_are_answered_in_order(world: Monitored, piece_bytes: int) -> None:
    client = await world.client(piece_bytes=piece_bytes)
    client.say('{"execute":"query-jobs","id":"a"}{"execute":"query-disks","id":"b"} {"execute":"nope","id":"c"}')
    client.say('{"execute"\n:\n"query-snapshots",\r\n"id":"d"}')
    await client.until(lambda: len(client.heard) == 6)
    assert [message["id"] for message in client.heard[2:]] == ["a", "b", "c", "d"]


async def test_a_command_waits_for_the_one_before_it_but_other_sessions_do_not(
    world: Monitored, gate: asyncio.Event
) -> None:
    client, other = await world.client(), await world.client()
    client.say('{"execute":"x-wait","id":"a"}{"execute":"query-jobs","id":"b"}')
    await turns()
    assert await other.run("query-jobs") == []
    assert not [message for message in client.heard if message.get("id") in ("a", "b")]
    gate.set()
    await client.until(lambda: client.heard[-1].get("id") == "b")
    assert [message.get("id") for message in client.heard[-2:]] == ["a", "b"]


async def test_wrong_arguments_are_told_by_name(world: Monitored, gate: asyncio.Event) -> None:
    client = await world.client()
    assert await client.run("x-sum", a=1, more_of_it=2) == 3
    assert await client.run("x-sum", a=1) == 2
    assert await client.fail("x-sum") == "x-sum: option a is missing"
    assert await client.fail("x-sum", a="1") == "x-sum: a is '1'; it must be a whole number"
    assert await client.fail("x-sum", a=1, b=2) == "x-sum: option 'b' is not known; known are a, more-of-it"
    assert await client.fail("snapshot-create", cbw_timeout=-1) == (
        "snapshot-create: cbw-timeout is -1; it must be a number from 0 to 86400"
    )
    answer = await client.ask("x-nothing")
    assert answer["error"] == {"class": "CommandNotFound", "desc": "The command x-nothing has not been found"}


async def test_failures_are_answered_and_bugs_logged(
    world: Monitored, gate: asyncio.Event, caplog: pytest.LogCaptureFixture
) -> None:
    client = await world.client()
    assert await client.fail("x-fail", how="io") == "read of 512 bytes at 0 on 'disk': Input/output error"
    assert await client.fail("x-fail", how="os") == "x-fail: Permission denied"
    assert not caplog.records
    assert await client.fail("x-fail", how="bug") == "division by zero"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert await client.run("query-jobs") == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b'{"execute": 7}', "QMP input member 'execute' must be a string"),
        (b'{"oops": nope}', "JSON parse error, JSON is malformed"),
        (b'{"execute": "query-jobs", "arguments": 1}', "QMP input member 'arguments' must be an object"),
        (b'{"execute": "query-jobs", "more": 1}', "QMP input member 'more' is unexpected"),
        (b"[1]", "QMP input must be a JSON object"),
        (b"12\n", "QMP input must be a JSON object"),
        (b'{"execute": "query-jo\n', "QMP: a string is not closed where its line ends"),
        (bytes(range(128, 256)) + b"\n", "QMP: JSON parse error, stray byte 0x80"),
        (b"[" * 100_000 + b"]" * 100_000, "QMP: JSON deeper than 64 levels"),
        (b'{"a":' * 100_000 + b"\n", "QMP: JSON deeper than 64 levels"),
        (b'{"execute": "' + b"x" * 10 * MiB + b'"}', "QMP: a message is longer than 1048576 bytes"),
        (b"[" + b"1," * 5 * MiB + b"\n", "QMP: a message is longer than 1048576 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
async def test_what_is_no_command_is_answered_and_the_session_goes_on(world: Monitored, said: bytes, told: str) -> None:
    client = await world.client(buffer_bytes=16 * MiB)
    client.say(said)
    assert await client.run("query-jobs") == []
    errors = [message["error"] for message in client.heard if "error" in message]
    assert errors[0]["class"] == "GenericError"
    assert errors[0]["desc"].startswith(told)
    assert len(errors) <= 2, "one for what was wrong, and at most one for its last line"


async def test_the_id_of_what_is_no_command_is_told_where_it_can_be_read(world: Monitored) -> None:
    client = await world.client()
    client.say('{"execute": 7, "id": {"any": ["thing"]}}{"id": 5}{"execute": "nope", "id": ""}{"id": 7, }')
    await client.until(lambda: len(client.heard) == 6)
    answers = client.heard[2:]
    assert [answer.get("id", "none") for answer in answers] == [{"any": ["thing"]}, 5, "", "none"]
    assert all("error" in answer for answer in answers)


async def test_garbage_is_answered_before_negotiation_too_and_does_not_end_it(world: Monitored) -> None:
    client = world.raw_client()
    client.say(b"\x16\x03\x01 a TLS hello\n")
    assert (await client.message(1))["error"]["class"] == "GenericError"
    assert await client.run("qmp_capabilities") == {}


@pytest.mark.parametrize("seed", range(5))
async def test_a_session_outlives_random_bytes_in_any_pieces(world: Monitored, seed: int) -> None:
    generator = random.Random(seed)
    client = await world.client(piece_bytes=generator.randrange(1, 500))
    for _ in range(20):
        client.say(generator.randbytes(generator.randrange(2000)))
    client.say(b"\xff")
    assert await client.run("query-jobs") == []


async def test_events_reach_every_session_in_order_with_their_time(world: Monitored) -> None:
    clients = [await world.client() for _ in range(2)]
    for number in range(20):
        world.daemon.events.announce("NUMBER", {"at": number})
    for client in clients:
        await client.until(lambda client=client: len(client.events()) == 20)  # type: ignore[misc]
        assert [data["at"] for data in client.events()] == list(range(20))
        stamp = next(message for message in client.heard if "event" in message)["timestamp"]
        assert 0 <= stamp["microseconds"] < 1_000_000
        assert stamp["seconds"] > 1_600_000_000


async def test_a_client_that_does_not_read_its_events_is_cut_off_and_no_other(
    world: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "QUEUED_BYTES_MAX", 100 * KiB)
    deaf = await world.client()
    server_end = world.server_stream
    healthy = await world.client()
    deaf.stream.pause()
    for number in range(30):
        world.daemon.events.announce("BIG", {"number": number, "filler": "x" * 10_000})
        assert server_end.queued_bytes <= 120 * KiB
        await turns(5)
    assert server_end.queued_bytes == 0
    assert len(world.monitor._sessions) == 1
    assert len(healthy.events()) == 30
    deaf.stream.abort()


async def test_a_client_that_does_not_read_its_answers_is_cut_off(
    world: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "QUEUED_BYTES_MAX", 100 * KiB)
    client = await world.client()
    server_end = world.server_stream
    client.stream.pause()
    for _ in range(40):
        client.say('{"execute":"query-commands"}' * 10)
        await turns(40)
        assert server_end.queued_bytes <= 120 * KiB
    assert not world.monitor._sessions
    client.stream.abort()


async def test_commands_that_wait_are_bounded(
    world: Monitored, gate: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await world.client()
    (session,) = world.monitor._sessions
    client.say('{"execute":"x-wait"}')
    for _ in range(400):
        client.say('{"execute":"query-jobs"}' + " " * 2000)
    await turns(300)
    bound = server.COMMANDS_QUEUED_MAX + 64 * KiB // 2000 + 1
    assert server.COMMANDS_QUEUED_MAX < len(session._queue) <= bound
    gate.set()
    await client.until(lambda: len([message for message in client.heard if "return" in message]) == 402)


async def test_quit_asks_for_the_end_and_is_answered(world: Monitored) -> None:
    client = await world.client()
    assert await client.run("quit") == {}
    assert world.quits == 1


async def test_a_monitor_that_refuses_takes_no_commands_but_still_tells_events(world: Monitored) -> None:
    client = await world.client()
    world.monitor.refuse()
    assert await client.fail("query-jobs") == "the daemon is shutting down"
    world.daemon.events.announce("STILL", {})
    await client.until(lambda: client.events("STILL") == [{}])


async def test_close_lets_the_command_that_runs_end_and_answers_it(world: Monitored, gate: asyncio.Event) -> None:
    client = await world.client()
    client.say('{"execute":"x-wait","id":"last"}{"execute":"query-jobs","id":"never"}')
    await turns()
    closing = asyncio.ensure_future(world.monitor.close())
    await turns()
    assert not closing.done()
    gate.set()
    await closing
    await client.until_ended()
    assert client.heard[-1] == {"return": {}, "id": "last"}


async def test_close_does_not_wait_for_a_client_that_never_reads(
    world: Monitored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CLOSE_GRACE_S", 0.01)
    client = await world.client(buffer_bytes=4 * KiB)
    client.stream.pause()
    world.daemon.events.announce("BIG", {"filler": "x" * 100_000})
    async with asyncio.timeout(10):
        await world.monitor.close()
    client.stream.abort()


async def test_what_a_session_holds_goes_with_it_also_if_it_ends_in_mid_command(
    world: Monitored, gate: asyncio.Event
) -> None:
    held: list[str] = []
    for way in ("idle", "busy"):
        client = await world.client()
        (session,) = world.monitor._sessions

        async def drop(way: str = way) -> None:
            held.append(way)

        session._context.at_end[way] = drop
        if way == "busy":
            client.say('{"execute":"x-wait"}')
            await turns()
        client.stream.abort()
        await turns()
        if way == "busy":
            assert held == ["idle"], "the command must end first"
            gate.set()
            await turns()
    assert held == ["idle", "busy"]
    assert not world.monitor._sessions


async def test_one_hold_that_fails_does_not_keep_the_others(world: Monitored, caplog: pytest.LogCaptureFixture) -> None:
    client = await world.client()
    (session,) = world.monitor._sessions
    dropped: list[int] = []

    async def fail() -> None:
        raise IoError(5, "snapshot", "delete")

    async def drop() -> None:
        dropped.append(1)

    session._context.at_end |= {"fails": fail, "drops": drop}
    client.stream.abort()
    await turns()
    assert dropped == [1]
    assert "ending a monitor session: delete on 'snapshot': Input/output error" in caplog.text


async def test_monitors_are_reached_over_unix_sockets(world: Monitored) -> None:
    listener = world.monitor.listen_unix(str(world.directory / "qmp"))
    reader, writer = await asyncio.open_unix_connection(listener.name)
    assert "QMP" in json.loads(await reader.readline())
    writer.write(b'{"execute":"qmp_capabilities"}')
    assert json.loads(await reader.readline()) == {"return": {}}
    writer.write(b'{"execute":"query-commands"}')
    names = [entry["name"] for entry in json.loads(await reader.readline())["return"]]
    assert {"qmp_capabilities", "blockdev-add", "quit", "snapshot-create"} <= set(names)
    writer.close()
    await writer.wait_closed()
    while world.monitor._sessions:
        await asyncio.sleep(0)
