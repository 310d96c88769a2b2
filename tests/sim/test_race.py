"""The race of QEMU's commit f8d59dfb40, directed: every step is held where it is until the test lets it go on.

1. A reader of a snapshot finds that a cluster was not changed yet, and goes to the live disk for it.
2. There it is held. 3. The guest changes the cluster, and everything that can go on does so until nothing can.
4. The guest must be waiting for the reader. 5. The reader goes on, and must get the old data; then the guest does.
6. A client does not read its socket while the guest changes what is queued for it.

Without the waiting, the same steps must show new data: so the test can tell.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest
from tests.sim.breaks import BREAKS

from fleecer.export import Export
from fleecer.export.server import Server
from fleecer.net.nbd_client import NbdClient
from fleecer.ranges import Buffer
from fleecer.testing.sim.cases import draw_scheduler
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.loop import SimLoop, simulate
from fleecer.testing.sim.oracle import SECTOR_BYTES, Violation
from fleecer.testing.sim.world import CLUSTER_BYTES, Format, Held, World, make_world
from fleecer.testing.streams import memory_streams

Kind = Literal["read", "status"]
Start = Callable[[World], Awaitable[Held]]

SEEDS = {"access": range(100), "target": range(100), "target over another image": range(20)}
SECTORS = CLUSTER_BYTES // SECTOR_BYTES

SCHEMES: dict[str, Start] = {
    "access": lambda world: world.take(),
    "target": lambda world: world.fleece(),
    "target over another image": lambda world: world.fleece(depth=1),
}
RULES = {
    "access": "changes do not wait for frozen reads",
    "target": "copies do not serialise",
    "target over another image": "copies do not serialise",
}
"""What each scheme rests on, as breaks.py names its absence."""


async def write_of_zeroes(world: World) -> None:
    """A write that also a status can see: all its bytes are zero."""
    change = world.history.begin(0, SECTORS, zero=True)
    await world.top.pwrite(0, bytes(CLUSTER_BYTES))
    world.history.finish(change)


CHANGES: dict[str, Callable[[World, Kind], Awaitable[None]]] = {
    "write": lambda world, kind: world.write(0, SECTORS) if kind == "read" else write_of_zeroes(world),
    "write zeroes": lambda world, _: world.zero(0, SECTORS),
    "discard": lambda world, _: world.discard(0, SECTORS),
}


async def quiet() -> None:
    """Returns when nothing can go on any more, but what is held and what waits for that."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    while loop.pending():
        await asyncio.sleep(1.0)


async def race(seed: int, disk_format: Format, scheme: str, kind: Kind, change: str, *, protected: bool) -> None:
    """The five steps. The other requests take times, and come in an order, that the seed decides."""
    world = await make_world(random.Random(seed), format=disk_format, over_nbd=seed % 2 == 1)
    if disk_format != "overlay":
        await world.write(0, 2 * SECTORS)
    held = await SCHEMES[scheme](world)
    disk = next(disk for disk in world.disks if disk.name == ("base" if disk_format == "overlay" else world.image.name))
    before = bytes(world.image.data)

    stop = disk.hold(kind)
    ask = world.read_snapshot if kind == "read" else world.status_of_snapshot
    reading = asyncio.ensure_future(ask(held, 0, SECTORS))
    await stop.reached()
    changing = asyncio.ensure_future(CHANGES[change](world, kind))
    await quiet()
    assert not reading.done(), "the reader was not held"
    assert changing.done() is not protected, "a change must wait for the reader exactly if the rule is there"
    assert (bytes(world.image.data) == before) is protected

    stop.release()
    if protected:
        await reading
    else:
        with pytest.raises(Violation, match="at its instant it was"):
            await reading
    await changing
    await world.read(0, 2 * SECTORS)
    await world.read_snapshot(held, 0, 2 * SECTORS)  # what was copied, by now
    await world.finish()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["read", "status"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_reader_between_look_up_and_disk_does_not_see_a_change(scheme: str, kind: Kind, change: str) -> None:
    for seed in SEEDS[scheme]:
        simulate(race(seed, "bare", scheme, kind, change, protected=True), draw_scheduler(seed))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["read", "status"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_the_rule_every_such_reader_sees_the_change(
    scheme: str, kind: Kind, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BREAKS[RULES[scheme]](monkeypatch)
    for seed in SEEDS[scheme]:
        simulate(race(seed, "bare", scheme, kind, change, protected=False), draw_scheduler(seed))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("disk_format", "kind"),
    # No status of a qcow2 image's own clusters waits for its file: the tables are in memory.
    [("raw", "read"), ("raw", "status"), ("overlay", "read"), ("overlay", "status"), ("qcow2", "read")],
)
def test_nor_does_a_reader_of_a_disk_that_keeps_claims_of_its_own(
    disk_format: Format, kind: Kind, scheme: str, change: str
) -> None:
    for seed in range(5):
        simulate(race(seed, disk_format, scheme, kind, change, protected=True), draw_scheduler(seed))


# The sixth step.


async def unread(seed: int, disk_format: Format, scheme: str, change: str) -> bytes:
    """What a client gets that asks for a cluster and reads its socket only after the guest has changed that."""
    world = await make_world(random.Random(seed), format=disk_format)
    await world.write(0, 2 * SECTORS)
    held = await SCHEMES[scheme](world)
    old = bytes(await held.edge.pread(0, CLUSTER_BYTES))
    server = Server(raise_internal_errors=True, clock=asyncio.get_running_loop().time)
    server.add(Export("past", "past", held.edge))
    near, far = memory_streams(buffer_bytes=SECTOR_BYTES)
    server.serve(near)
    client = await NbdClient.connect(far, "past")
    far.pause()
    asking = asyncio.ensure_future(client.pread(0, CLUSTER_BYTES))
    await quiet()
    assert near.queued_bytes > CLUSTER_BYTES - 2 * SECTOR_BYTES, "the reply is not waiting at the sender"
    await CHANGES[change](world, "read")  # returns: who does not read its socket stalls nobody
    await quiet()
    assert not asking.done()
    far.resume()
    found = bytes(await asking)
    await client.close()
    await server.remove("past", hard=True)
    await world.finish()
    assert len(found) == len(old)
    return b"" if found == old else found


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("disk_format", ["raw", "bare", "qcow2"])
def test_what_waits_to_be_read_by_a_slow_client_does_not_change(disk_format: Format, scheme: str, change: str) -> None:
    for seed in range(10):
        assert not simulate(unread(seed, disk_format, scheme, change), draw_scheduler(seed)), "it changed"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_were_it_the_disks_own_buffer_it_would_change(
    scheme: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shared(self: SimDisk, offset: int, length: int) -> Buffer:
        return memoryview(self.data)[offset : offset + length]

    monkeypatch.setattr(SimDisk, "pread", shared)
    for seed in range(10):
        assert simulate(unread(seed, "raw", scheme, change), draw_scheduler(seed)), "the same bytes came all the same"
