"""qcow2 with QEMU's tools as judges: what they write we read, what we write they read, and both checks agree."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.qcow2_world import Model, checked, guest, new_image, open_image, qemu_check

from fleecer.formats.qcow2.header import AUTOCLEAR_FIELD, INCOMPATIBLE_FIELD
from fleecer.formats.qcow2.tables import OFFSET_MASK
from fleecer.testing.memory import MemoryStorage, random_turns

pytestmark = pytest.mark.peer


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_raw(path: Path) -> bytes:
    """What QEMU reads from an image."""
    out = path.with_suffix(".out")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


def loaded(path: Path) -> MemoryStorage:
    return MemoryStorage(path.read_bytes(), name="image")


def compressible(seed: int, size: int) -> bytes:
    generator = random.Random(seed)
    content = bytearray()
    while len(content) < size:
        kind = generator.random()
        length = generator.randint(100, 9000)
        content += bytes(length) if kind < 0.2 else generator.randbytes(length // 20 + 1) * 20
    return bytes(content[:size])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"version": 2},
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 2 << 20, "refcount_bits": 1},
        {"cluster_size": 4096, "refcount_bits": 2, "lazy_refcounts": True},
        {"compression": "zstd"},
        {"extended_l2": True},
        {"extended_l2": True, "cluster_size": 16384, "compression": "zstd"},
        {"backing_file": "base \u00e9.raw", "backing_format": "raw"},
        {"backing_file": "base.raw", "backing_format": "raw", "version": 2, "cluster_size": 1024},
    ],
)
async def test_qemu_accepts_a_new_image_and_sees_what_was_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    size = 100 * 1024 * 1024 + 512
    path = tmp_path / "new.qcow2"
    path.write_bytes((await new_image(size, **options)).data)
    if "backing_file" in options:
        (tmp_path / options["backing_file"]).write_bytes(bytes(4096))
    assert qemu_check(path.read_bytes(), tmp_path) == (0, 0)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    data = info["format-specific"]["data"]
    assert info["virtual-size"] == size
    assert info["cluster-size"] == options.get("cluster_size", 65536)
    assert data["compat"] == ("0.10" if options.get("version") == 2 else "1.1")
    assert data["refcount-bits"] == options.get("refcount_bits", 16)
    assert data.get("lazy-refcounts", False) == options.get("lazy_refcounts", False)
    assert data["compression-type"] == ("zstd" if options.get("compression") else "zlib")
    assert data.get("extended-l2", False) == options.get("extended_l2", False)
    assert info.get("backing-filename") == options.get("backing_file")
    assert info.get("backing-filename-format") == options.get("backing_format")
    run("qemu-io", "-c", "write -P 7 1M 100k", path)
    assert await guest(await open_image(loaded(path))).pread(1 << 20, 100 << 10) == b"\7" * (100 << 10)


@pytest.mark.parametrize(("cluster_size", "more"), [(512, ""), (4096, ""), (65536, ""), (16384, ",extended_l2=on")])
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
async def test_a_compressed_image_is_read_and_overwritten(
    kind: str, cluster_size: int, more: str, tmp_path: Path
) -> None:
    content = compressible(cluster_size, 50 * cluster_size + 512)
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    options = f"compression_type={kind},cluster_size={cluster_size}{more}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    run("qemu-img", "snapshot", "-c", "packed", path)
    storage = loaded(path)
    node = await open_image(storage)
    model = Model(content, cluster_size)
    await model.compare(guest(node))
    for _ in range(15):
        await model.round(guest(node), 6, 3 * cluster_size)
    await node.close()
    storage.pause = random_turns(cluster_size, 2)
    node = await open_image(storage, l2_cache_bytes=8192, refcount_cache_bytes=8192)
    for _ in range(15):
        await model.round(guest(node), 8, 3 * cluster_size)
    await model.compare(guest(node))
    await node.close()
    storage.pause = None
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert qemu_check(storage.data, tmp_path) == (0, 0)
    path.write_bytes(storage.data)
    assert as_raw(path) == model.content
    run("qemu-img", "snapshot", "-a", "packed", path)
    assert as_raw(path) == content
    run("qemu-img", "snapshot", "-d", "packed", path)
    assert qemu_check(path.read_bytes(), tmp_path) == (0, 0)


async def test_overwriting_all_compressed_clusters_frees_what_they_shared(tmp_path: Path) -> None:
    content = compressible(1, 64 * 65536)
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(content)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    storage = loaded(path)
    node = await open_image(storage)
    for cluster in range(64):
        await guest(node).pwrite(cluster * 65536 + 100, b"part")
        await guest(node).flush()
    await node.close()
    assert qemu_check(storage.data, tmp_path) == (0, 0)
    expected = bytearray(content)
    for cluster in range(64):
        expected[cluster * 65536 + 100 : cluster * 65536 + 104] = b"part"
    path.write_bytes(storage.data)
    assert as_raw(path) == expected


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "metadata,extended_l2=on"])
async def test_a_preallocated_image_is_written_in_place(preallocation: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", f"preallocation={preallocation}", path, "3M")
    storage = loaded(path)
    size = storage.size
    node = await open_image(storage)
    model = Model(bytes(3 << 20), 1)
    for _ in range(20):
        await model.round(guest(node), 4, 200_000)
    await model.compare(guest(node))
    await node.close()
    assert qemu_check(storage.data, tmp_path) == (0, 0)
    assert storage.size <= size + 65536


@pytest.mark.parametrize("options", ["cluster_size=4096", "extended_l2=on", "extended_l2=on,cluster_size=16k"])
async def test_a_chain_made_by_qemu_reads_the_same(options: str, tmp_path: Path) -> None:
    raw, path = tmp_path / "base.raw", tmp_path / "top.qcow2"
    content = random.Random(1).randbytes(1_000_000)
    raw.write_bytes(content)
    run("qemu-img", "create", "-f", "qcow2", "-b", raw, "-F", "raw", "-o", options, path, "1500000")
    run("qemu-io", "-c", "write -P 1 100k 30k", "-c", "write -z 200k 64k", "-c", "discard 300k 64k", path)
    run("qemu-io", "-c", "write -P 2 401k 5k", "-c", "write -z 520k 12k", "-c", "write -P 3 524k 3k", path)
    node = await open_image(loaded(path), backing=MemoryStorage(content, read_only=True))
    assert (node._image.header.backing_file, node._image.header.backing_format) == (str(raw), "raw")
    assert await guest(node).pread(0, node.size) == as_raw(path)


async def test_bitmaps_of_qemu_are_counted_and_become_inconsistent_by_a_write(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", path, "64M")
    run("qemu-img", "bitmap", "--add", "-g", "4096", path, "b0")
    run("qemu-io", "-c", "write 0 1M", path)
    storage = loaded(path)
    assert struct.unpack_from(">Q", storage.data, AUTOCLEAR_FIELD)[0] == 1
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    start = bytes(storage.data[:AUTOCLEAR_FIELD]), bytes(storage.data[AUTOCLEAR_FIELD + 8 : 65536])
    node = await open_image(storage)
    await guest(node).pwrite(1 << 20, b"new data" * 65536)
    await node.close()
    assert (bytes(storage.data[:AUTOCLEAR_FIELD]), bytes(storage.data[AUTOCLEAR_FIELD + 8 : 65536])) == start
    assert struct.unpack_from(">Q", storage.data, AUTOCLEAR_FIELD)[0] == 0
    report = await checked(storage)
    assert (report.corruptions, report.leaks) == (0, 0), report.messages
    assert qemu_check(storage.data, tmp_path)[0] == 0


async def test_an_image_left_dirty_by_qemu_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "64M")
    # "abort" leaves the refcounts behind, as a crash does.
    done = subprocess.run(
        ["qemu-io", "-c", "write -P 3 1M 5M", "-c", "flush", "-c", "abort", path], capture_output=True
    )
    assert done.returncode != 0
    storage = loaded(path)
    assert struct.unpack_from(">Q", storage.data, INCOMPATIBLE_FIELD)[0] == 1
    assert (await checked(storage)).corruptions
    node = await open_image(storage)
    assert await guest(node).pread(1 << 20, 5 << 20) == b"\3" * (5 << 20)
    await guest(node).pwrite(0, b"x" * 100)
    await node.close()
    assert qemu_check(storage.data, tmp_path) == (0, 0)
    path.write_bytes(storage.data)
    assert as_raw(path)[1 << 20 : 6 << 20] == b"\3" * (5 << 20)


@pytest.mark.parametrize("extended_l2", [False, True])
async def test_both_checks_agree_on_damaged_tables(*, extended_l2: bool, tmp_path: Path) -> None:
    size, entry_bytes = (16384, 16) if extended_l2 else (4096, 8)
    sound = await new_image(600 * size, cluster_size=size, extended_l2=extended_l2)
    node = await open_image(sound)
    await guest(node).pwrite(0, random.Random(1).randbytes(500 * size))
    await guest(node).discard(100 * size, 20 * size)
    await node.close()
    header, l2 = node._image.header, node._l1[0] & OFFSET_MASK
    block = struct.unpack_from(">Q", sound.data, header.refcount_table_offset)[0]
    generator = random.Random(2)
    seen: set[tuple[bool, bool]] = set()
    for _ in range(40):
        damaged = MemoryStorage(bytes(sound.data), name="image")
        for _ in range(generator.randint(1, 3)):
            kind = generator.choice(
                ("refcount", "refcount", "copied", "entry", "flip", "l1", *["bitmap"] * extended_l2)
            )
            if kind == "refcount":
                struct.pack_into(
                    ">H",
                    damaged.data,
                    block + 2 * generator.randrange(len(sound.data) // size),
                    generator.randint(0, 2),
                )
            elif kind == "bitmap":
                bits = generator.choice((1 << 32 | 1, 0, (1 << 32) - 1, 1 << 35))
                struct.pack_into(">Q", damaged.data, l2 + entry_bytes * generator.randrange(500) + 8, bits)
            elif kind == "l1":
                struct.pack_into(
                    ">Q", damaged.data, header.l1_table_offset + 8, generator.choice((0, 1 << 60, 1 << 63))
                )
            else:
                at = l2 + entry_bytes * generator.randrange(500)
                entry = struct.unpack_from(">Q", damaged.data, at)[0]
                changed = {"copied": entry ^ 1 << 63, "entry": 0, "flip": entry ^ 1 << generator.randrange(9, 30)}[kind]
                struct.pack_into(">Q", damaged.data, at, changed)
        report = await checked(damaged)
        corruptions, leaks = qemu_check(damaged.data, tmp_path)
        assert bool(report.corruptions) == bool(corruptions), report.messages
        if not corruptions:
            assert report.leaks == leaks
        seen.add((bool(corruptions), bool(leaks)))
    assert len(seen) >= 3
