"""The server: which exports there are, who may connect, and who is sent away."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.nbd_world import HELLO
from tests.serving_world import SIZE, Client, OldClient, Serving, turns

from fleecer.block.nodes.null import NullNode
from fleecer.errors import InUse, IoError, NotFound, UsageError
from fleecer.export import Export, server
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_tcp, connect_unix
from fleecer.units import GiB, MiB
from fleecer.wire.nbd import ExportUnknown


@pytest.fixture
async def serving() -> AsyncIterator[Serving]:
    world = Serving()
    yield world
    world.fault.clear()
    await world.close()


# Exports.


async def test_an_export_tells_what_its_node_can_do(serving: Serving) -> None:
    client = await serving.connect()
    assert (client.info.name, client.info.size, client.info.read_only) == ("disk", SIZE, False)
    assert client.info.can_multi_conn
    assert client.info.can_trim
    assert client.info.can_fast_zero
    assert (client.info.block_size_min, client.info.block_size_max) == (1, 32 * MiB)
    assert client.contexts == ("base:allocation",)
    await client.close()


async def test_a_read_only_export_offers_no_changes(serving: Serving) -> None:
    serving.offer("past", writable=False)
    client = await serving.connect("past")
    assert client.info.read_only
    assert not client.can_trim
    assert not client.can_zero
    await client.close()


async def test_the_empty_name_is_the_only_disk(serving: Serving) -> None:
    past = Export("past", "past", serving.attach("past", writable=False), snapshot_of="disk")
    serving.server.add(past)
    assert serving.server.export_named("") is serving.export
    serving.offer("second")
    assert serving.server.export_named("") is None
    unnamed = Export("third", "", serving.attach("third"))
    serving.server.add(unnamed)
    assert serving.server.export_named("") is unnamed


async def test_names_and_ids_are_taken_once(serving: Serving) -> None:
    edge = serving.attach("another")
    with pytest.raises(UsageError, match=r"^export id 'disk' is taken; choose another$"):
        serving.server.add(Export("disk", "other", edge))
    with pytest.raises(UsageError, match=r"^export name 'disk' is taken; choose another$"):
        serving.server.add(Export("other", "disk", edge))
    with pytest.raises(UsageError, match="no NBD string"):
        serving.server.add(Export("long", "x" * 5000, edge))
    assert [export.export_id for export in serving.server.exports()] == ["disk"]
    with pytest.raises(NotFound, match=r"^export 'nowhere' does not exist$"):
        serving.server.export("nowhere")


async def test_an_unknown_export_is_refused_by_name(serving: Serving) -> None:
    with pytest.raises(ExportUnknown, match="'nowhere'"):
        await serving.connect("nowhere")
    await turns()
    assert not serving.server.clients()


async def test_an_export_with_clients_is_removed_only_hard(serving: Serving) -> None:
    held = serving.fault.hold("write", 0, 512)
    client = await serving.client()
    other = await serving.connect()
    slow = client.codec.write(0, b"w" * 512)
    client.send()
    await held.reached()
    with pytest.raises(InUse, match=r"^export 'disk' has 2 clients; disconnect them, or remove it hard$"):
        await serving.server.remove("disk")
    assert serving.server.export_named("disk") is serving.export
    removing = asyncio.ensure_future(serving.server.remove("disk", hard=True))
    await turns()
    assert not removing.done(), "a request is still in flight"
    with pytest.raises(ExportUnknown):
        await serving.connect("disk")
    held.release()
    assert await removing is serving.export
    assert (await client.reply(slow)).error == 0
    await client.ended()
    assert serving.export.edge.busy == 0
    with pytest.raises(IoError):
        await other.pread(0, 512)
    await other.close()


async def test_an_export_without_clients_is_removed_at_once(serving: Serving) -> None:
    assert await serving.server.remove("disk") is serving.export
    with pytest.raises(NotFound):
        await serving.server.remove("disk")


async def test_exports_count_what_their_clients_do(serving: Serving) -> None:
    client = await serving.connect()
    await client.pwrite(0, bytes(1000))
    await client.zero(0, 512, unmap=True)
    await client.pread(0, 4096)
    export = serving.export
    assert (export.reads, export.writes, export.bytes_read, export.bytes_written) == (1, 2, 4096, 1000)
    await client.close()


async def test_an_export_of_a_huge_sparse_node_answers_status_over_what_one_request_spans(serving: Serving) -> None:
    node = NullNode("null", 1 << 50)
    serving.graph.add(node, named=True)
    serving.server.add(Export("null", "null", serving.graph.attach(node, "export 'null'", "nbd")))
    client = await serving.connect("null")
    assert client.info.size == 1 << 50
    assert (await client.block_status((1 << 50) - 3 * GiB, 3 * GiB))["base:allocation"][0][0] == 3 * GiB
    await client.close()


# Who may connect.


async def test_a_client_that_negotiates_for_too_long_is_dropped(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_TIMEOUT_S", 0.02)
    quick = await serving.client()
    await OldClient(serving.stream()).until_ended()
    assert "it entered no export in 0.02 s" in caplog.text
    await asyncio.sleep(0.03)  # the other's time would be up too
    assert serving.server.clients() == serving.server.clients(serving.export)
    assert not quick.endings


async def test_a_full_server_makes_room_by_dropping_who_has_not_entered() -> None:
    serving = Serving(connections_max=2)
    inside = await serving.client()
    lingering = OldClient(serving.stream())
    await turns()
    newcomer = await serving.client()
    await lingering.until_ended()
    assert not inside.endings
    assert len(serving.server.clients(serving.export)) == 2
    refused = Client(serving.stream(), "disk")
    await refused.ended()
    assert not newcomer.endings
    assert len(serving.server.clients()) == 2
    await serving.close()


async def test_notes_about_dropped_clients_are_limited_in_rate(
    serving: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    for _ in range(50):
        serving.server.note_drop("somebody", "because")
    assert len(caplog.records) == 1
    now += 11
    serving.server.note_drop("somebody", "because")
    serving.server.note_drop("somebody", "because")
    assert [record.getMessage() for record in caplog.records] == [
        "dropped NBD client somebody: because",
        "dropped NBD client somebody: because (49 more since the last such line)",
    ]


async def test_a_client_that_breaks_the_handshake_is_dropped_with_a_note(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    client = Client(serving.stream(), "disk")
    client.codec.outgoing.append(b"\xff" * 4)
    client.send()
    await client.ended()
    assert "unknown bits" in caplog.text


async def test_clients_in_the_handshake_are_sent_away_when_the_server_stops(serving: Serving) -> None:
    client = OldClient(serving.stream())
    client.stream.send([HELLO])
    await turns()
    assert len(serving.server.clients()) == 1
    await serving.server.stop()
    await client.until_ended()


# Over real sockets.


async def test_disks_are_served_over_unix_and_tcp_sockets_at_once(serving: Serving, tmp_path: Path) -> None:
    unix = serving.server.listen_unix(str(tmp_path / "nbd.sock"))
    tcp = serving.server.listen_tcp("127.0.0.1", 0)
    host, port = tcp.address[:2]
    one = await NbdClient.connect(await connect_unix(unix.name), "disk")
    other = await NbdClient.connect(await connect_tcp(host, port), "disk")
    data = bytes(range(256)) * 400
    await one.pwrite(777, data)
    assert await other.pread(777, len(data)) == data
    await asyncio.gather(*(client.pread(0, SIZE) for client in (one, other) for _ in range(20)))
    await one.close()
    await other.close()
    await serving.server.stop()
    assert not (tmp_path / "nbd.sock").exists()
    with pytest.raises(IoError) as caught:
        await connect_tcp(host, port)
    assert caught.value.errno == errno.ECONNREFUSED


async def test_a_client_that_dies_in_mid_request_leaves_nothing(serving: Serving, tmp_path: Path) -> None:
    serving.server.listen_unix(str(tmp_path / "nbd.sock"))
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await loop.sock_connect(sock, str(tmp_path / "nbd.sock"))
    await loop.sock_sendall(sock, HELLO + b"half an opt")
    while not serving.server.clients():
        await asyncio.sleep(0)
    sock.close()
    while serving.server.clients():
        await asyncio.sleep(0)
