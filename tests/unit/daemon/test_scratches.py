"""Scratches that are there beforehand: used where they fit, closed where they do not, and never missed."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from tests.open_files import open_files

from fleecer.daemon import Daemon, scratches
from fleecer.errors import IoError
from fleecer.export import Export
from fleecer.storage.file import FileStorage, open_unlinked
from fleecer.storage.pool import running_pool
from fleecer.units import KiB

SIZE = 64 * KiB


class World(Daemon):
    """A daemon with disks of its own in `images`. `opened` has what was opened so far: where, and how many."""

    def __init__(self, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(raise_internal_errors=True)
        self.images = images
        self.opened: list[tuple[str, int]] = []
        self.refusing = False
        self.go_on: asyncio.Event | None = None  # what opening waits for
        monkeypatch.setattr(scratches, "open_unlinked", self._open)
        monkeypatch.setattr(scratches, "READY_AFTER_S", 0)

    def _open(self, directory: str, sizes: Sequence[int]) -> asyncio.Future[list[FileStorage]]:
        self.opened.append((directory, len(sizes)))
        if self.go_on is not None:
            return asyncio.ensure_future(self._open_later(self.go_on, directory, sizes))
        if not self.refusing:
            return open_unlinked(directory, sizes)
        refused: asyncio.Future[list[FileStorage]] = asyncio.get_running_loop().create_future()
        refused.set_exception(IoError(errno.EROFS, directory, "create a scratch file"))
        return refused

    async def _open_later(self, go_on: asyncio.Event, directory: str, sizes: Sequence[int]) -> list[FileStorage]:
        await go_on.wait()
        return await open_unlinked(directory, sizes)

    async def disk(self, name: str, directory: Path | None = None) -> Export:
        path = (directory or self.images) / f"{name}.raw"
        path.write_bytes((name.encode() * SIZE)[:SIZE])
        return await self.serve_image(name, str(path))

    async def ready(self) -> None:
        """Returns once what is to be ready is."""
        await asyncio.sleep(0.001)
        while self.snapshots._kept:
            await asyncio.wait(self.snapshots._kept)
            await asyncio.sleep(0.001)

    def unnamed(self) -> int:
        """How many scratches are open."""
        return sum(path.endswith("(deleted)") for path in open_files(self.images.parent))


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    (tmp_path / "images").mkdir()
    made = World(tmp_path / "images", monkeypatch)
    failures: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    yield made
    await made.close()
    assert not failures
    assert not open_files(tmp_path), "descriptors were left"
    await running_pool().close()


async def test_nothing_is_opened_beforehand_unless_it_is_asked_for(world: World) -> None:
    await world.disk("one")
    await world.snapshots.create(name="s")
    await world.ready()
    assert world.opened == [(str(world.images), 1)]


async def test_a_snapshot_takes_what_is_ready_and_the_next_is_opened(world: World) -> None:
    disks = [await world.disk(name) for name in ("one", "two")]
    world.snapshots.keep_scratches_ready()
    await world.ready()
    assert world.opened == [(str(world.images), 2)]
    assert world.unnamed() == 2
    world.opened.clear()
    await world.snapshots.create(["one"], name="s")
    assert not world.opened, "there was one"
    await disks[0].edge.pwrite(0, b"new")
    past = world.snapshots.find("s").parts[0].access
    assert bytes(await past.pread(0, 3)) == b"one"
    await world.ready()
    assert world.opened == [(str(world.images), 1)]
    assert world.unnamed() == 3
    await world.snapshots.create(name="t")
    assert len(world.opened) == 1
    for name in ("s", "t"):
        await world.snapshots.delete(name)
    await world.ready()
    assert world.unnamed() == 2


async def test_what_was_never_written_to_is_what_a_snapshot_gets(world: World) -> None:
    disk = await world.disk("one")
    world.snapshots.keep_scratches_ready()
    for name in ("s", "t"):
        await world.ready()
        await world.snapshots.create(name=name)
        part = world.snapshots.find(name).parts[0]
        assert part.fleece.snapshot.scratch.node.size == SIZE
        assert not any(await part.fleece.snapshot.scratch.pread(0, SIZE))
        await disk.edge.pwrite(0, b"x" * SIZE)
        assert any(await part.fleece.snapshot.scratch.pread(0, SIZE))
        await world.snapshots.delete(name)


async def test_another_place_or_another_length_is_opened_anew(world: World, tmp_path: Path) -> None:
    await world.disk("one")
    world.snapshots.keep_scratches_ready()
    await world.ready()
    world.opened.clear()
    (tmp_path / "elsewhere").mkdir()
    await world.snapshots.create(name="s", scratch_directory=str(tmp_path / "elsewhere"))
    assert world.opened == [(str(tmp_path / "elsewhere"), 1)]
    (ready,) = world.snapshots._scratches._ready.values()
    ready[1].size -= 1  # as if the disk had grown since
    await world.snapshots.create(name="t")
    assert world.opened[1:] == [(str(world.images), 1)]
    assert [part.size for part in world.snapshots.find("t").parts] == [SIZE]
    await world.ready()
    assert world.unnamed() == 3
    await world.snapshots.create(name="next")
    assert world.opened[3:] == [], "what did not fit was replaced"
    await world.snapshots.delete("next")
    await world.ready()
    assert world.unnamed() == 3
    world.images.rename(tmp_path / "moved")
    await world.snapshots.create(name="u")
    assert world.opened[-1] == (str(tmp_path / "moved"), 1)
    await world.ready()
    assert world.unnamed() == 4
    (tmp_path / "moved").rename(world.images)


async def test_a_disk_that_goes_takes_what_was_ready_for_it_along(world: World) -> None:
    await world.disk("one")
    await world.disk("two")
    world.snapshots.keep_scratches_ready()
    await world.ready()
    await world.remove_export("one")
    await world.ready()
    assert world.unnamed() == 1


async def test_what_is_being_opened_for_a_disk_that_has_gone_is_closed(world: World) -> None:
    await world.disk("one")
    world.go_on = asyncio.Event()
    world.snapshots.keep_scratches_ready()
    while not world.opened:
        await asyncio.sleep(0)
    await world.remove_export("one")
    world.go_on.set()
    await world.ready()
    assert world.unnamed() == 0


async def test_no_more_are_ready_than_there_may_be(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratches, "READY_MAX", 2)
    for name in ("one", "two", "three"):
        await world.disk(name)
    world.snapshots.keep_scratches_ready()
    await world.ready()
    assert world.opened == [(str(world.images), 2)]
    await world.snapshots.create(name="s")
    assert world.opened[1:] == [(str(world.images), 1)]
    await world.ready()
    assert world.unnamed() == 3 + 2


async def test_each_directory_is_asked_by_itself_and_one_that_takes_none_is_no_failure(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    await world.disk("one")
    await world.disk("two", tmp_path / "other")
    world.refusing = True
    world.snapshots.keep_scratches_ready()
    await world.ready()
    assert world.opened == [(str(world.images), 1), (str(tmp_path / "other"), 1)]
    with pytest.raises(IoError, match="choose another place with --scratch-dir"):
        await world.snapshots.create(name="s")
    await world.ready()
    world.refusing = False
    await world.snapshots.create(name="s")


async def test_what_was_ready_is_closed_if_the_rest_cannot_be_opened(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    await world.disk("one")
    world.snapshots.keep_scratches_ready()
    await world.ready()
    await world.disk("two", tmp_path / "other")
    world.refusing = True
    with pytest.raises(IoError, match="Read-only"):
        await world.snapshots.create(name="s")
    await world.ready()
    assert world.unnamed() == 0
    assert world.snapshots.sets() == []


async def test_the_end_of_the_daemon_closes_what_is_ready_and_what_is_being_opened(world: World) -> None:
    await world.disk("one")
    world.snapshots.keep_scratches_ready()
    await world.ready()
    await world.disk("two")
    await world.snapshots.create(["one"], name="s")
    await asyncio.sleep(0.001)
    assert len(world.opened) == 2, "two are being opened, and the timer has run"
    await world.close()
    assert not [path for path in open_files(world.images) if "deleted" in path]
    assert sorted(os.listdir(world.images)) == ["one.raw", "two.raw"]
