"""Files that were cut short are refused, and nothing else is: what is legal past the end, and what looking costs."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.qcow2_world import HeldStorage, checked, guest, new_image, open_image

from fleecer.errors import CorruptImage
from fleecer.formats.qcow2 import truncation
from fleecer.formats.qcow2.header import DIRTY, INCOMPATIBLE_FIELD, REFCOUNT_TABLE_FIELD
from fleecer.formats.qcow2.refcounts import RefcountWidth
from fleecer.formats.qcow2.tables import COMPRESSED, COPIED, OFFSET_MASK, ZERO_FLAG
from fleecer.testing.memory import MemoryStorage
from fleecer.units import KiB, MiB

CLUSTER = 4 * KiB
SIZE = 100 * CLUSTER
ADVICE = "the image was cut short; restore it from a backup"


async def filled(**options: Any) -> tuple[MemoryStorage, int]:
    """An image whose last cluster in the file is that of guest cluster 99; and where the one L2 table stands."""
    storage = await new_image(SIZE, cluster_size=CLUSTER, **options)
    node = await open_image(storage)
    await guest(node).pwrite(0, random.Random(1).randbytes(SIZE))
    await node.close()
    return storage, node._l1[0] & OFFSET_MASK


def entry_at(storage: MemoryStorage, offset: int) -> int:
    return int(struct.unpack_from(">Q", storage.data, offset)[0])


def put(storage: MemoryStorage, offset: int, entry: int) -> None:
    struct.pack_into(">Q", storage.data, offset, entry)


def host_of(storage: MemoryStorage, table: int, cluster: int) -> int:
    return entry_at(storage, table + cluster * 8) & OFFSET_MASK


async def refusal(storage: MemoryStorage, *, read_only: bool = True) -> str:
    """Why the image is refused, which must leave the file as it was."""
    before = bytes(storage.data)
    with pytest.raises(CorruptImage) as caught:
        await open_image(storage, read_only=read_only)
    assert storage.data == before
    return str(caught.value)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_the_last_count_is_found_whatever_its_width(refcount_bits: int) -> None:
    width = RefcountWidth(refcount_bits.bit_length() - 1)
    assert width.find_last_used(bytes(64)) == -1
    for index in range(width.entries_in(64)):
        for count in {1, width.maximum}:
            data = bytearray(64)
            width.put(data, 0, 1)
            width.put(data, index, count)
            assert width.find_last_used(bytes(data)) == index


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize(("version", "refcount_bits"), [(2, 16), (3, 1), (3, 16), (3, 64)])
async def test_a_cluster_past_the_end_is_named_with_its_place_and_the_end(
    version: int, refcount_bits: int, read_only: bool
) -> None:
    storage, table = await filled(version=version, refcount_bits=refcount_bits)
    host = host_of(storage, table, 60)
    await storage.truncate(host)
    text = await refusal(storage, read_only=read_only)
    assert text == (
        f"image 'disk': cluster 60 of the disk is at byte {host}, past the end of the file at {host}: {ADVICE}"
    )


async def test_every_length_that_loses_a_whole_cluster_is_refused_and_none_that_does_not() -> None:
    storage, table = await filled()
    whole = bytes(storage.data)
    last = host_of(storage, table, 99)
    assert last + CLUSTER == len(whole)
    for end in range(CLUSTER, len(whole), 1111):
        cut = MemoryStorage(whole[:end])
        if end > last:
            node = await open_image(cut)
            assert bytes(await guest(node).pread(99 * CLUSTER, CLUSTER)) == whole[last:end].ljust(CLUSTER, b"\0")
        else:
            await refusal(cut)


async def test_a_table_that_lost_its_end_is_refused() -> None:
    storage = await new_image(SIZE, cluster_size=CLUSTER)
    node = await open_image(storage)
    await guest(node).pwrite(0, b"x" * CLUSTER)
    await node.close()
    table = node._l1[0] & OFFSET_MASK
    await storage.truncate(table + 512)
    text = f"the L2 table of cluster 0 of the disk ends at byte {table + CLUSTER}, past the end of the file at "
    assert f"{text}{table + 512}: {ADVICE}" in await refusal(storage)


async def test_a_compressed_cluster_past_the_end_is_refused() -> None:
    storage, table = await filled()
    host = host_of(storage, table, 99)
    put(storage, table + 99 * 8, COMPRESSED | host)
    await storage.truncate(host)
    assert f"cluster 99 of the disk is at byte {host}" in await refusal(storage)


async def test_a_refcount_block_that_was_cut_off_is_no_way_to_get_by() -> None:
    storage, table = await filled()
    first = entry_at(storage, REFCOUNT_TABLE_FIELD)
    block = entry_at(storage, first)
    # The block moves behind the data, and guest cluster 99 behind the block.
    place = len(storage.data)
    put(storage, first, place)
    grown = storage.data[block : block + CLUSTER] + bytes(CLUSTER)
    await storage.pwrite(storage.size, grown)
    counts = place + place // CLUSTER * 2
    storage.data[counts : counts + 4] = b"\0\1" * 2
    put(storage, table + 99 * 8, place + CLUSTER | COPIED)
    for end in (place, place + 8, place + CLUSTER):
        cut = MemoryStorage(bytes(storage.data[:end]))
        assert f"cluster 99 of the disk is at byte {place + CLUSTER}" in await refusal(cut)


async def test_refcounts_of_a_dirty_image_prove_nothing() -> None:
    storage, table = await filled(lazy_refcounts=True)
    host = host_of(storage, table, 50)
    block = entry_at(storage, entry_at(storage, REFCOUNT_TABLE_FIELD))
    kept = host // CLUSTER * 2
    storage.data[block + kept : block + CLUSTER] = bytes(CLUSTER - kept)  # not written yet when the machine stopped
    storage.data[INCOMPATIBLE_FIELD + 7] = DIRTY
    await storage.truncate(host)
    for read_only in (True, False):
        assert f"cluster 50 of the disk is at byte {host}" in await refusal(storage, read_only=read_only)


async def test_counts_past_the_end_are_leaks_and_do_not_keep_an_image_from_use() -> None:
    storage, _ = await filled()
    block = entry_at(storage, entry_at(storage, REFCOUNT_TABLE_FIELD))
    end = len(storage.data) // CLUSTER
    storage.data[block + end * 2 : block + end * 2 + 20] = b"\0\1" * 10
    node = await open_image(storage)
    await guest(node).pwrite(0, b"y" * 512)
    await node.close()
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 10)


async def test_zero_clusters_and_bad_entries_past_the_end_are_not_taken_for_a_cut() -> None:
    storage, table = await filled()
    await storage.truncate(host_of(storage, table, 98))
    put(storage, table + 99 * 8, host_of(storage, table, 99) | COPIED | ZERO_FLAG)
    put(storage, table + 98 * 8, 1 << 50 | 512 | COPIED)
    edge = guest(await open_image(storage))
    assert not any(await edge.pread(99 * CLUSTER, CLUSTER))
    with pytest.raises(CorruptImage, match="misaligned"):
        await edge.pread(98 * CLUSTER, 512)


async def test_a_sound_image_costs_two_reads_however_many_tables_it_has() -> None:
    made = await new_image(64 * MiB, cluster_size=512)
    node = await open_image(made)
    for at in range(0, 4 * MiB, 32 * KiB):  # an L2 table each
        await guest(node).pwrite(at, b"x" * 512)
    await node.close()
    storage = HeldStorage(bytes(made.data))
    reads = storage.counts
    await open_image(storage, read_only=True)
    assert reads["read"] <= 5, "header, L1 table and two for the check, one of them perhaps in two parts"


async def test_many_tables_that_name_one_place_are_read_once() -> None:
    storage, table = await filled()
    # A hostile header: 64 MiB of disk, whose L1 entries name the one table again and again, and counts past the end.
    entries = 32
    struct.pack_into(">Q", storage.data, 24, entries * 512 * CLUSTER)
    struct.pack_into(">I", storage.data, 36, entries)
    l1 = entry_at(storage, 40)
    for index in range(entries):
        put(storage, l1 + index * 8, table | COPIED)
    storage.data[INCOMPATIBLE_FIELD + 7] = DIRTY
    held = HeldStorage(bytes(storage.data))
    await open_image(held, read_only=True)
    assert held.counts["read"] < 8


async def test_the_search_ends_after_a_bounded_number_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await new_image(3 * 512 * CLUSTER, cluster_size=CLUSTER)
    node = await open_image(storage)
    for at in range(3):
        await guest(node).pwrite(at * 512 * CLUSTER, b"x" * CLUSTER)
    await node.close()
    put(storage, node._l1[2] & OFFSET_MASK, 1 << 40 | COPIED)
    storage.data[INCOMPATIBLE_FIELD + 7] = DIRTY
    assert "cluster 1024 of the disk" in await refusal(storage)
    monkeypatch.setattr(truncation, "_SEARCHED_BYTES_MAX", 2 * CLUSTER)
    with pytest.raises(CorruptImage, match="past the file's end"):
        await guest(await open_image(storage, read_only=True)).pread(1024 * CLUSTER, 512)


@pytest.mark.peer
@pytest.mark.parametrize(
    "options", ["preallocation=metadata", "preallocation=falloc", "compat=0.10", "refcount_bits=1"]
)
async def test_images_that_qemu_made_are_opened_whole_and_refused_cut(options: str, tmp_path: Path) -> None:
    path = tmp_path / "made.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size=4k,{options}", path, "8M"], check=True
    )
    await open_image(MemoryStorage(path.read_bytes()), read_only=True)
    writes = ["-c", "write -P 1 0 1M", "-c", "write -z 2M 512k", "-c", "write -P 2 3M 100k", "-c", "discard 0 256k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *writes, path], check=True, stdout=subprocess.DEVNULL)
    whole = path.read_bytes()
    for read_only in (True, False):
        node = await open_image(MemoryStorage(whole), read_only=read_only)
        assert await guest(node).pread(3 * MiB, 100 * KiB) == b"\2" * (100 * KiB)
        await refusal(MemoryStorage(whole[: len(whole) // 2]), read_only=read_only)


@pytest.mark.peer
async def test_an_image_packed_by_qemu_is_opened_whole_and_refused_cut(tmp_path: Path) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "packed.qcow2"
    raw.write_bytes(b"".join(bytes([at % 251]) * 3000 for at in range(700)))
    subprocess.run(["qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    whole = path.read_bytes()
    edge = guest(await open_image(MemoryStorage(whole), read_only=True))
    assert bytes(await edge.pread(0, edge.size)).startswith(raw.read_bytes())
    await refusal(MemoryStorage(whole[: len(whole) - 65536]))
