"""Power cuts in the middle of qcow2 work: every state the file may be left in must be sound.

The file records its writes and flushes. A state is what the last finished flush made durable, and any part of the
sectors written since. In each one the check finds no corruption, flushed data is there, and every sector holds what was
flushed or what was written later. Orders of writing that break this are tried too: they must be found out.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.qcow2_world import checked, guest, new_image, open_image
from tests.sim.breaks import BREAKS

from fleecer.block.edge import Edge
from fleecer.block.nodes.qcow2 import commit
from fleecer.block.nodes.qcow2.commit import Committer
from fleecer.formats.qcow2.header import DIRTY, INCOMPATIBLE_FIELD
from fleecer.ranges import Buffer
from fleecer.testing.memory import MemoryStorage

SECTOR = 512
Log = list[tuple[str, int, bytes]]


class RecordingStorage(MemoryStorage):
    """Writes down what would reach a disk, in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content, name="image")
        self.start = bytes(content)
        self.log: Log = []

    def _put(self, offset: int, data: Buffer) -> None:
        super()._put(offset, data)
        self.log.append(("write", offset, bytes(data)))

    async def sync(self) -> None:
        await super().sync()
        self.log.append(("flush", 0, b""))


class Worker:
    """Random work on a disk; the log also tells what each sector may hold, and what was promised."""

    def __init__(self, storage: RecordingStorage, edge: Edge, content: bytes, seed: int) -> None:
        self.log = storage.log
        self.edge = edge
        self.content = bytearray(content)
        self.random = random.Random(seed)
        self.log.append(("promise", 0, content))

    async def flush(self) -> None:
        await self.edge.flush()
        self.log.append(("promise", 0, bytes(self.content)))

    async def step(self, longest: int) -> None:
        """One request, or now and then a flush."""
        sectors = len(self.content) // SECTOR
        length = min(self.random.randint(1, longest), sectors) * SECTOR
        offset = self.random.randint(0, sectors - length // SECTOR) * SECTOR
        kind = self.random.choice(("write", "write", "write", "zero", "discard", "flush"))
        if kind == "flush":
            await self.flush()
            return
        data = self.random.randbytes(length) if kind == "write" else bytes(length)
        self.log.append(("may", offset, data))
        if kind == "write":
            await self.edge.pwrite(offset, data)
        elif kind == "zero":
            await self.edge.zero(offset, length, unmap=self.random.random() < 0.7)
        else:
            await self.edge.discard(offset, length)
            data = bytes(await self.edge.pread(offset, length))
        self.content[offset : offset + length] = data


def states(storage: RecordingStorage, seed: int, count: int) -> Iterator[tuple[bytes, bytes, list[tuple[int, bytes]]]]:
    """(what the file holds, what was promised, what may be there instead) after `count` random power cuts."""
    generator = random.Random(seed)
    cuts = [generator.randrange(1, len(storage.log) + 1) for _ in range(count)]
    header_writes = [at for at, (kind, offset, _) in enumerate(storage.log) if kind == "write" and offset < SECTOR]
    if header_writes:
        # Few, and what they name must be there: every second cut comes right after one.
        cuts[::2] = [
            min(generator.choice(header_writes) + generator.randint(1, 2), len(storage.log)) for _ in cuts[::2]
        ]
    cuts.sort()
    durable = bytearray(storage.start)
    pending: list[tuple[int, bytes]] = []
    promised, may = b"", list[tuple[int, bytes]]()
    position = 0
    for cut in cuts:
        for kind, offset, data in storage.log[position:cut]:
            if kind == "write":
                pending.extend((offset + at, data[at : at + SECTOR]) for at in range(0, len(data), SECTOR))
            elif kind == "flush":
                _apply(durable, pending)
                pending = []
            elif kind == "promise":
                promised, may = data, []
            else:
                may.append((offset, data))
        position = cut
        state = bytearray(durable)
        likely = generator.choice((0.1, 0.5, 0.9))
        _apply(state, [piece for piece in pending if generator.random() < likely])
        yield bytes(state), promised, list(may)


def _apply(content: bytearray, pieces: list[tuple[int, bytes]]) -> None:
    for offset, data in pieces:
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data


async def judge(storage: RecordingStorage, count: int, *, backing: MemoryStorage | None = None, seed: int = 0) -> None:
    """Raises AssertionError if a power cut may leave damage."""
    for state, promised, may in states(storage, seed, count):
        image = MemoryStorage(state, name="image")
        report = await checked(image)
        assert not report.corruptions, report.messages
        edge = guest(await open_image(image, backing=backing, read_only=True))
        found = bytes(await edge.pread(0, edge.size))
        for at in range(0, len(promised), SECTOR):
            sector = found[at : at + SECTOR]
            allowed = [promised[at : at + SECTOR]]
            allowed += [data[at - start :][:SECTOR] for start, data in may if start <= at < start + len(data)]
            assert sector in allowed, f"sector at {at} is neither what was flushed nor what was written since"


async def recorded(
    size: int,
    steps: int,
    longest: int,
    seed: int,
    *,
    backing: MemoryStorage | None = None,
    fill: int = 0,
    **options: Any,
) -> RecordingStorage:
    """The record of random work on a new image, whose first `fill` bytes were written before."""
    start = await new_image(size, **options)
    content = bytearray(bytes(backing.data[:size]).ljust(size, b"\0") if backing is not None else bytes(size))
    if fill:
        node = await open_image(start, backing=backing)
        content[:fill] = random.Random(seed).randbytes(fill)
        await guest(node).pwrite(0, bytes(content[:fill]))
        await node.close()
    storage = RecordingStorage(bytes(start.data))
    await work(storage, bytes(content), steps, longest, seed, backing=backing)
    return storage


async def work(
    storage: RecordingStorage,
    content: bytes,
    steps: int,
    longest: int,
    seed: int,
    *,
    backing: MemoryStorage | None = None,
) -> None:
    """Random steps on the image in `storage`, which reads as `content`; then it is closed."""
    node = await open_image(storage, backing=backing)
    worker = Worker(storage, guest(node), content, seed)
    for _ in range(steps):
        await worker.step(longest)
    await worker.flush()
    await node.close()


WORK: dict[str, dict[str, Any]] = {
    "small clusters": {"size": 64 * 512, "steps": 60, "longest": 8, "cluster_size": 512},
    "one-bit refcounts": {"size": 64 * 4096, "steps": 60, "longest": 40, "cluster_size": 4096, "refcount_bits": 1},
    "version 2": {"size": 128 * 1024, "steps": 60, "longest": 20, "cluster_size": 1024, "version": 2},
    "subclusters": {"size": 8 * 16384, "steps": 60, "longest": 40, "cluster_size": 16384, "extended_l2": True},
    "new refcount blocks": {"size": 400 * 512, "steps": 60, "longest": 60, "cluster_size": 512, "refcount_bits": 64},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WORK)
async def test_a_power_cut_leaves_a_sound_image_with_all_that_was_flushed(name: str, seed: int) -> None:
    storage = await recorded(seed=seed, **WORK[name])
    await judge(storage, 120, seed=seed)


@pytest.mark.parametrize("kind", [{"cluster_size": 1024}, {"cluster_size": 16384, "extended_l2": True}])
async def test_a_power_cut_over_a_backing_node_leaves_a_sound_image(kind: dict[str, Any]) -> None:
    backing = MemoryStorage(random.Random(5).randbytes(90 * 512), name="backing", read_only=True)
    options: dict[str, Any] = {"backing_file": "base", "backing_format": "raw", **kind}
    storage = await recorded(128 * 512, 60, 12, 1, backing=backing, **options)
    await judge(storage, 200, backing=backing)


async def test_a_power_cut_while_the_refcount_table_moves_leaves_a_sound_image() -> None:
    # One cluster of table covers 64 blocks of 64 clusters: 2 MiB.
    size = 3 * 1024 * 1024
    storage = await recorded(size, 25, 500, 2, fill=1_900_000, cluster_size=512, refcount_bits=64)
    before = await open_image(MemoryStorage(storage.start), read_only=True)
    after = await open_image(storage, read_only=True)
    clusters = [node._image.header.refcount_table_clusters for node in (before, after)]
    assert clusters[0] == 1 < clusters[1], "the table did not move while it was recorded"
    await judge(storage, 60)


@pytest.mark.peer
@pytest.mark.parametrize("kind", [{"cluster_size": 4096}, {"cluster_size": 16384, "extended_l2": True}])
async def test_a_power_cut_leaves_internal_snapshots_intact(kind: dict[str, Any], tmp_path: Path) -> None:
    start = await new_image(64 * 4096, **kind)
    node = await open_image(start)
    old = random.Random(3).randbytes(40 * 4096).ljust(64 * 4096, b"\0")
    await guest(node).pwrite(0, old[: 40 * 4096])
    await node.close()
    path = tmp_path / "disk.qcow2"
    path.write_bytes(start.data)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True)
    storage = RecordingStorage(path.read_bytes())
    await work(storage, old, 60, 20, 4)
    await judge(storage, 150)
    for state, _, _ in list(states(storage, 6, 3)):
        path.write_bytes(state)
        out = tmp_path / "before.raw"
        subprocess.run(["qemu-img", "convert", "-l", "snapshot.name=before", "-O", "raw", path, out], check=True)
        assert out.read_bytes() == old


async def test_a_power_cut_while_an_image_is_created_leaves_a_whole_image_or_none() -> None:
    storage = RecordingStorage(b"")
    await new_image(1 << 20, storage, cluster_size=1024, refcount_bits=64)
    whole = 0
    for state, _, _ in states(storage, 1, 100):
        if any(state[:SECTOR]):
            report = await checked(MemoryStorage(state))
            assert (report.corruptions, report.leaks) == (0, 0), report.messages
            whole += 1
    assert 0 < whole < 100


async def test_a_power_cut_while_refcounts_are_rebuilt_leaves_a_sound_image_or_a_dirty_one() -> None:
    start = await new_image(300 * 512, cluster_size=512, lazy_refcounts=True)
    node = await open_image(start)
    content = random.Random(1).randbytes(250 * 512)
    await guest(node).pwrite(0, content)
    await node.close()
    header = node._image.header
    block = int.from_bytes(start.data[header.refcount_table_offset : header.refcount_table_offset + 8], "big")
    start.data[block : block + 512] = bytes(512)
    start.data[INCOMPATIBLE_FIELD + 7] = DIRTY
    storage = RecordingStorage(bytes(start.data))
    await (await open_image(storage)).close()
    dirty = 0
    for state, _, _ in states(storage, 2, 100):
        image = MemoryStorage(state)
        if state[INCOMPATIBLE_FIELD + 7] & DIRTY:
            dirty += 1
            node = await open_image(image)
            assert await guest(node).pread(0, len(content)) == content
        report = await checked(image)
        assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert 0 < dirty < 100


async def test_an_image_left_by_a_power_cut_can_be_written_on() -> None:
    storage = await recorded(seed=9, **WORK["small clusters"])
    for state, _, _ in states(storage, 1, 20):
        image = MemoryStorage(state, name="image")
        node = await open_image(image)
        edge = guest(node)
        data = random.Random(1).randbytes(edge.size)
        await edge.pwrite(0, data)
        await node.close()
        assert not (await checked(image)).corruptions
        assert await guest(await open_image(image)).pread(0, edge.size) == data


# Orders that must be found out. Each breaks one rule of commit.py.


async def explore(name: str) -> None:
    """More seeds and cuts than the tests of the right order take."""
    for seed in range(6):
        await judge(await recorded(seed=seed, **WORK[name]), 200, seed=seed)


async def _maps_before_counts(self: Committer) -> None:
    batch = self._take()
    await self._store_maps(batch)
    await self._store_counts(batch)
    await self._allocator.release(batch.freed)


async def _no_flush_after_counts(self: Committer) -> None:
    batch = self._take()
    await self._write(batch.counts)
    await self._write(batch.table_entries)
    await self._store_maps(batch)
    await self._allocator.release(batch.freed)


async def _release_before_the_last_flush(self: Committer) -> None:
    batch = self._take()
    await self._allocator.release(batch.freed)
    counts = self._allocator.cache.take_dirty()
    await self._store_counts(batch._replace(counts=[(piece.offset, bytes(piece.data)) for piece in counts]))
    await self._store_maps(batch)


async def _table_entries_late(self: Committer) -> None:
    batch = self._take()
    await self._store_counts(batch._replace(table_entries=[]))
    await self._store_maps(batch)
    await self._write(batch.table_entries)
    await self._image.file.flush()
    await self._allocator.release(batch.freed)


async def _no_last_flush(self: Committer) -> None:
    batch = self._take()
    await self._store_counts(batch)
    await self._write(batch.maps)
    await self._write(batch.l1_entries)
    await self._allocator.release(batch.freed)


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (_maps_before_counts, "small clusters"),
        (_no_flush_after_counts, "small clusters"),
        (_release_before_the_last_flush, "small clusters"),
        (_table_entries_late, "new refcount blocks"),
        (_no_last_flush, "small clusters"),
    ],
)
async def test_a_commit_in_a_wrong_order_is_found_out(
    broken: Callable[[Committer], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit.Committer, "_commit", broken)
    with pytest.raises(AssertionError, match=r"refcount|neither"):
        await explore(name)


async def test_using_a_freed_cluster_before_the_commit_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS["freed clusters are used at once"](monkeypatch)
    with pytest.raises(AssertionError, match=r"refcount|neither"):
        await explore("small clusters")
