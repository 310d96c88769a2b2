"""Hostile qcow2 images: whatever their bytes say, requests end with an answer or a FleecerError, in bounded memory."""

from __future__ import annotations

import asyncio
import random
import struct
import tracemalloc
import zlib

import pytest
from tests.qcow2_world import checked, guest, new_image, open_image

from fleecer.block.nodes.qcow2 import Qcow2Node
from fleecer.errors import FleecerError, FormatError
from fleecer.formats.qcow2.tables import COMPRESSED, OFFSET_MASK
from fleecer.testing.memory import MemoryStorage
from fleecer.units import MiB

CLUSTER = 4096
SIZE = 100 * CLUSTER
FIELDS = [(4, "I"), (8, "Q"), (16, "I"), (20, "I"), (24, "Q"), (32, "I"), (36, "I"), (40, "Q"), (48, "Q"), (56, "I")]
FIELDS += [
    (60, "I"),
    (64, "Q"),
    (72, "Q"),
    (80, "Q"),
    (88, "Q"),
    (96, "I"),
    (100, "I"),
    (104, "B"),
    (112, "I"),
    (116, "I"),
]


async def filled(storage: MemoryStorage, seed: int) -> Qcow2Node:
    """A new image, opened, with data and zeroes here and there."""
    node = await open_image(storage)
    generator = random.Random(seed)
    for _ in range(20):
        at = generator.randrange(SIZE - 5 * CLUSTER)
        await guest(node).pwrite(at, generator.randbytes(generator.randint(1, 5 * CLUSTER)))
    await guest(node).zero(3 * CLUSTER, 9 * CLUSTER, unmap=False)
    return node


async def sound_image(seed: int = 0) -> bytes:
    """An image with data, zero clusters, compressed clusters and discarded ones."""
    storage = await new_image(SIZE, cluster_size=CLUSTER)
    node = await filled(storage, seed)
    await guest(node).pwrite(90 * CLUSTER, bytes(CLUSTER))
    await node.close()
    # A compressed cluster where that last one was stored, which stays counted once.
    data = bytearray(storage.data)
    l2 = node._l1[0] & OFFSET_MASK
    host = struct.unpack_from(">Q", data, l2 + 90 * 8)[0] & OFFSET_MASK
    packer = zlib.compressobj(wbits=-12)
    packed = packer.compress(b"packed! " * (CLUSTER // 8)) + packer.flush()
    data[host : host + len(packed)] = packed
    struct.pack_into(">Q", data, l2 + 90 * 8, COMPRESSED | host)
    return bytes(data)


def one_line(error: FleecerError) -> str:
    """The error's text, which must be one line."""
    assert "\n" not in str(error)
    return str(error)


async def used(data: bytes, seed: int = 0) -> str:
    """Uses an image in every way; returns what came of opening it. Raises whatever is no FleecerError."""
    outcome = "opened"
    for read_only in (True, False):
        storage = MemoryStorage(data, name="image")
        try:
            node = await open_image(storage, read_only=read_only, l2_cache_bytes=1 * MiB)
        except FleecerError as error:
            outcome = one_line(error)
            continue
        edge = guest(node)
        generator = random.Random(seed)
        for _ in range(12):
            offset = generator.randrange(max(1, min(node.size, 2 * SIZE)))
            length = min(generator.randint(1, 6 * CLUSTER), node.size - offset)
            requests = [edge.pread(offset, length), edge.block_status(offset, length)]
            if not read_only:
                requests += [edge.pwrite(offset, b"x" * length), edge.discard(offset, length)]  # type: ignore[list-item]
                requests += [edge.zero(offset, length), edge.flush()]  # type: ignore[list-item]
            done = await asyncio.gather(*requests, return_exceptions=True)
            for result in done:
                if isinstance(result, BaseException) and not isinstance(result, FleecerError):
                    raise result
        try:
            await node.close()
        except FleecerError as error:
            one_line(error)
    try:
        await checked(MemoryStorage(data, name="image"))
    except FleecerError as error:
        one_line(error)
    return outcome


@pytest.mark.parametrize(("offset", "width"), FIELDS)
async def test_every_header_field_at_its_extremes(offset: int, width: str) -> None:
    sound = await sound_image()
    top = (1 << 8 * struct.calcsize(">" + width)) - 1
    value = struct.unpack_from(">" + width, sound, offset)[0]
    near = (value - 1, value + 1, value << 1, value >> 1, value + CLUSTER, value - CLUSTER)
    tracemalloc.start()
    try:
        for extreme in (0, 1, top, top - 1, top >> 1, (top >> 1) + 1, len(sound), 1 << 20, 1 << 22, *near):
            data = bytearray(sound)
            struct.pack_into(">" + width, data, offset, extreme & top)
            await used(bytes(data))
            assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()


async def test_the_sound_image_is_used_without_complaint() -> None:
    sound = await sound_image()
    assert await used(sound) == "opened"
    report = await checked(MemoryStorage(sound, name="image"))
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert await guest(await open_image(MemoryStorage(sound))).pread(90 * CLUSTER, 8) == b"packed! "


@pytest.mark.parametrize("seed", range(6))
async def test_random_bytes_in_the_metadata(seed: int) -> None:
    sound = await sound_image(seed)
    generator = random.Random(seed)
    metadata = 6 * CLUSTER  # header, L1, refcounts, and what follows
    outcomes: set[str] = set()
    for round_ in range(40):
        data = bytearray(sound)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(metadata) if generator.random() < 0.7 else generator.randrange(200)
            data[at : at + 1] = generator.randbytes(1)
            if generator.random() < 0.3:
                at -= at % 8
                data[at : at + 8] = struct.pack(
                    ">Q", generator.choice((1 << 63, 1 << 62, generator.getrandbits(64), len(data)))
                )
        outcomes.add(await used(bytes(data[: generator.choice((len(data), len(data), len(data) // 2))]), round_))
    assert len(outcomes) > 2


async def test_refcounts_and_l2_entries_of_all_kinds() -> None:
    sound = await sound_image()
    node = await open_image(MemoryStorage(sound), read_only=True)
    l2 = node._l1[0] & OFFSET_MASK
    generator = random.Random(4)
    for round_ in range(60):
        data = bytearray(sound)
        for cluster in range(100):
            if generator.random() < 0.3:
                host = generator.choice((0, generator.randrange(len(data)), generator.getrandbits(56)))
                host &= generator.choice((-1, -CLUSTER))
                flags = generator.choice((0, 1 << 63, 1 << 62, 1, 1 << 63 | 1))
                struct.pack_into(">Q", data, l2 + cluster * 8, host | flags)
        await used(bytes(data), round_)


async def extended_image(seed: int = 0) -> tuple[bytes, int]:
    """An image with extended L2 entries of every sort, and where its L2 table is."""
    storage = await new_image(SIZE, cluster_size=4 * CLUSTER, extended_l2=True)
    node = await filled(storage, seed)
    await guest(node).discard(40 * CLUSTER + 512, 6 * CLUSTER)
    await node.close()
    return bytes(storage.data), node._l1[0] & OFFSET_MASK


@pytest.mark.parametrize("seed", range(3))
async def test_extended_l2_entries_of_all_kinds(seed: int) -> None:
    sound, l2 = await extended_image(seed)
    assert await used(sound) == "opened"
    generator = random.Random(seed)
    for round_ in range(40):
        data = bytearray(sound)
        for cluster in range(25):
            if generator.random() < 0.3:
                host = generator.choice((0, generator.randrange(len(data)), generator.getrandbits(56)))
                host &= generator.choice((-1, -4 * CLUSTER))
                flags = generator.choice((0, 1 << 63, 1 << 62, 1, 1 << 63 | 1))
                struct.pack_into(">Q", data, l2 + cluster * 16, host | flags)
            if generator.random() < 0.3:
                bitmap = generator.choice((0, 1, 1 << 32, (1 << 32) - 1, (1 << 64) - 1, generator.getrandbits(64)))
                struct.pack_into(">Q", data, l2 + cluster * 16 + 8, bitmap)
        for _ in range(generator.choice((0, 0, 8))):
            bit = generator.randrange(8 * len(data))
            data[bit >> 3] ^= 1 << (bit & 7)
        await used(bytes(data), round_)


@pytest.mark.parametrize("length", [0, 1, 71, 72, 103, 104, 4095])
async def test_a_file_that_is_cut_off_in_its_header_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        await open_image(MemoryStorage((await sound_image())[:length], name="image"))


@pytest.mark.parametrize("seed", range(4))
async def test_flipped_bits_and_lost_ends(seed: int) -> None:
    sound = await sound_image(seed)
    generator = random.Random(seed)
    refused = 0
    tracemalloc.start()
    try:
        for round_ in range(40):
            data = bytearray(sound)
            for _ in range(generator.choice((0, 1, 1, 2, 8, 64))):
                bit = generator.randrange(8 * generator.choice((120, 7 * CLUSTER, len(data))))
                data[bit >> 3] ^= 1 << (bit & 7)
            if generator.random() < 0.5:
                del data[generator.randrange(len(data)) :]
            refused += await used(bytes(data), round_) != "opened"
            assert tracemalloc.get_traced_memory()[1] < 64 * MiB
    finally:
        tracemalloc.stop()
    assert 5 < refused < 40
