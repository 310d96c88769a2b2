"""The demo's proof and map: they must fail when the image is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleecer.cli.demo.blockmap import Run, draw
from fleecer.cli.demo.disk import BLOCK_BYTES
from fleecer.cli.demo.proof import ProofFailedError, prove
from fleecer.cli.demo.writer import Journal, Write, stamped
from fleecer.units import KiB

BLOCKS = 300


class World:
    """A disk in memory, its first copy, its journal, and an image of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.first = bytes([9]) * (BLOCKS * BLOCK_BYTES)
        self.disk = bytearray(self.first)
        self.journal = Journal()
        self.asked = self.answered = 0
        self.image = b""

    def issue(self, block: int) -> Write:
        return self.journal.issue(block)

    def land(self, block: int, write: Write) -> None:
        self.disk[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = stamped(block, write.number)

    def write(self, block: int) -> Write:
        write = self.issue(block)
        self.land(block, write)
        self.journal.acknowledge(block, write)
        return write

    def snapshot(self) -> None:
        self.asked = self.journal.tick()
        self.image = bytes(self.disk)
        self.answered = self.journal.mark()

    def change(self, block: int, content: bytes) -> None:
        start = block * BLOCK_BYTES
        self.image = self.image[:start] + content + self.image[start + len(content) :]

    def prove(self) -> tuple[int, int, int, int]:
        (self.directory / "first").write_bytes(self.first)
        (self.directory / "image").write_bytes(self.image)
        return prove(
            str(self.directory / "image"), str(self.directory / "first"), self.journal, self.asked, self.answered
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    for block in (1, 2, 3, 2, 280):
        world.write(block)
    return world


def test_an_image_of_the_instant_is_proven(world: World) -> None:
    in_it, not_in_it = world.issue(5), world.issue(6)
    world.land(5, in_it)
    world.snapshot()
    world.land(6, not_in_it)
    world.journal.acknowledge(5, in_it)
    world.journal.acknowledge(6, not_in_it)
    world.write(1)
    assert world.prove() == (BLOCKS, 5, 2, 1)
    assert world.journal.overwritten == {1}


def test_a_block_with_a_newer_write_is_found(world: World) -> None:
    world.snapshot()
    world.write(10)
    newer = world.write(1)
    world.change(1, stamped(1, newer.number))
    with pytest.raises(ProofFailedError, match="that is no single instant"):
        world.prove()


def test_a_newer_write_is_found_even_if_nothing_else_was_written_since(world: World) -> None:
    world.snapshot()
    newer = world.write(1)
    world.change(1, stamped(1, newer.number))
    with pytest.raises(ProofFailedError, match="before the snapshot was asked for, or after it was made"):
        world.prove()


def test_a_block_with_an_older_write_is_found(world: World) -> None:
    world.snapshot()
    world.change(2, stamped(2, world.journal.writes[2][0].number))
    with pytest.raises(ProofFailedError, match="no single instant"):
        world.prove()


def test_a_block_that_lost_its_only_write_is_found(world: World) -> None:
    world.snapshot()
    world.change(280, world.first[:BLOCK_BYTES])
    with pytest.raises(ProofFailedError, match="before the snapshot was asked for"):
        world.prove()


def test_a_mixture_of_two_writes_is_found(world: World) -> None:
    world.snapshot()
    newer = world.write(2)
    world.change(2, stamped(2, newer.number)[: BLOCK_BYTES // 2])
    with pytest.raises(ProofFailedError, match="block 2 holds neither what it held at first nor one whole write to it"):
        world.prove()


def test_another_blocks_write_is_found(world: World) -> None:
    world.snapshot()
    world.change(2, stamped(3, world.journal.writes[3][0].number))
    with pytest.raises(ProofFailedError, match="block 2 holds neither"):
        world.prove()


def test_a_write_that_was_never_made_is_found(world: World) -> None:
    world.snapshot()
    world.change(2, stamped(2, 999))
    with pytest.raises(ProofFailedError, match="block 2 holds write 999, which was never made to it"):
        world.prove()


def test_a_changed_block_that_nobody_wrote_is_found(world: World) -> None:
    world.snapshot()
    world.change(200, b"x")
    with pytest.raises(ProofFailedError, match="block 200 holds neither"):
        world.prove()


@pytest.mark.parametrize("end", [BLOCKS * BLOCK_BYTES - BLOCK_BYTES, 256 * BLOCK_BYTES])
def test_an_image_cut_short_is_found(world: World, end: int) -> None:
    world.snapshot()
    world.image = world.image[:end]
    with pytest.raises(ProofFailedError, match="the image"):
        world.prove()


def test_the_map_has_a_sign_for_each_part_and_the_totals() -> None:
    size = 640 * KiB
    runs = [Run(0, 320 * KiB, "shared"), Run(320 * KiB, 321 * KiB, "preserved"), Run(321 * KiB, size, "zero")]
    *rows, legend = draw(runs, size)
    assert [len(row.replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")) for row in rows] == [
        64
    ] * 10
    plain = "".join(rows).replace("\x1b[32m", "").replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert plain == "o" * 320 + "#" + "." * 319
    assert "preserved 1.0 KiB" in legend
    assert "shared 320 KiB" in legend
    assert "zero 319 KiB" in legend
