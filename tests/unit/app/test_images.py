"""Restoring images, in this process. Backing up needs a server, and is tested with real ones in tests/e2e."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from pathlib import Path

import pytest

from fleecer.app import images
from fleecer.block.graph import Graph
from fleecer.block.node import Node
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import create_qcow2
from fleecer.errors import CorruptImage, IoError, PermissionConflict, UnsupportedFormat, UsageError
from fleecer.formats.qcow2.header import parse_header
from fleecer.jobs import transfer
from fleecer.ranges import Buffer
from fleecer.storage.file import create_file, open_file
from fleecer.units import KiB, MiB


@pytest.fixture
def backup(tmp_path: Path) -> str:
    path = tmp_path / "backup.raw"
    with path.open("wb") as file:
        file.write(os.urandom(200 * KiB))
        file.seek(5 * MiB)
        file.write(b"end")
        file.truncate(6 * MiB + 100)
    return str(path)


def content(path: str | Path) -> bytes:
    return Path(path).read_bytes()


async def test_a_raw_image_is_restored_sparsely_and_whole(tmp_path: Path, backup: str) -> None:
    done = await images.restore(backup, str(tmp_path / "new.raw"))
    assert content(tmp_path / "new.raw") == content(backup)
    assert (tmp_path / "new.raw").stat().st_blocks * 512 < MiB
    assert (done.format, done.size) == ("raw", 6 * MiB + 100)
    assert 200 * KiB <= done.bytes_written <= 208 * KiB


async def test_a_qcow2_image_goes_there_and_back(tmp_path: Path, backup: str) -> None:
    await images.restore(backup, str(tmp_path / "middle.qcow2"))
    await images.restore(str(tmp_path / "middle.qcow2"), str(tmp_path / "new.raw"))
    assert content(tmp_path / "new.raw") == content(backup)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 100_001])
async def test_a_size_that_is_no_multiple_of_512_survives_a_qcow2_which_others_see_rounded_up(
    tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    (tmp_path / "odd.raw").write_bytes(data)
    await images.restore(str(tmp_path / "odd.raw"), str(tmp_path / "middle.qcow2"))
    done = await images.restore(str(tmp_path / "middle.qcow2"), str(tmp_path / "new.raw"))
    assert done.size == size
    assert content(tmp_path / "new.raw") == data
    header = parse_header(content(tmp_path / "middle.qcow2")[:65536], 1 << 40, "middle.qcow2")
    assert header.size == -(-size // 512) * 512
    resized = dataclasses.replace(header, size=header.size + 512)
    assert resized.disk_size == resized.size, "a record that the header contradicts does not count"


async def test_an_existing_target_is_refused_without_force_and_replaced_with_it(tmp_path: Path, backup: str) -> None:
    target = tmp_path / "new.raw"
    target.write_bytes(b"old")
    with pytest.raises(UsageError) as caught:
        await images.restore(backup, str(target))
    assert str(caught.value) == f"target '{target}' exists; use --force to overwrite it"
    assert target.read_bytes() == b"old"
    await images.restore(backup, str(target), force=True)
    assert content(target) == content(backup)


async def test_a_target_that_appears_meanwhile_is_kept(
    tmp_path: Path, backup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "new.raw"
    real_copy = transfer.copy

    async def copy_and_be_overtaken(*args: object, **kwargs: object) -> transfer.Progress:
        target.write_bytes(b"theirs")
        return await real_copy(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "copy", copy_and_be_overtaken)
    with pytest.raises(UsageError, match="exists; use --force to overwrite it"):
        await images.restore(backup, str(target))
    assert target.read_bytes() == b"theirs"


async def test_a_target_that_somebody_holds_is_not_replaced_even_with_force(tmp_path: Path, backup: str) -> None:
    target = tmp_path / "new.raw"
    target.write_bytes(b"old" * 512)
    holder = await open_file(str(target))
    try:
        with pytest.raises(PermissionConflict, match="another process holds it"):
            await images.restore(backup, str(target), force=True)
    finally:
        await holder.close()
    assert target.read_bytes() == b"old" * 512
    assert sorted(os.listdir(tmp_path)) == ["backup.raw", "new.raw"]


async def test_a_backup_is_not_restored_over_itself(tmp_path: Path, backup: str) -> None:
    before = content(backup)
    with pytest.raises(UsageError, match="is the backup itself; choose another"):
        await images.restore(backup, backup, force=True)
    assert content(backup) == before


@pytest.mark.peer
async def test_a_backup_is_not_restored_over_what_it_is_based_on(tmp_path: Path, backup: str) -> None:
    above = str(tmp_path / "above.qcow2")
    format_name = os.path.splitext(backup)[1][1:]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", backup, "-F", format_name, above], check=True)
    before = content(backup)
    with pytest.raises(UsageError, match="is a backing file of the backup; choose another"):
        await images.restore(above, backup, force=True)
    assert content(backup) == before


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_bytes_that_do_not_read_back_fail_the_restore_and_leave_nothing(
    tmp_path: Path, backup: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real_pwrite = FileNode.pwrite

    async def flipping(node: FileNode, offset: int, data: Buffer, serialising: bool = False) -> None:
        changed = bytearray(data)
        if len(changed) > 64 * KiB:
            changed[70000 % len(changed)] ^= 1
        await real_pwrite(node, offset, changed, serialising)

    monkeypatch.setattr(FileNode, "pwrite", flipping)
    monkeypatch.setattr(FileNode, "writer", Node.writer)
    with pytest.raises(CorruptImage, match="reads back otherwise than it was written; do not use this image"):
        await images.restore(backup, str(tmp_path / f"new.{kind}"))
    assert os.listdir(tmp_path) == ["backup.raw"]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
async def test_a_write_that_fails_leaves_nothing_and_an_existing_target_as_it_was(
    tmp_path: Path, backup: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = tmp_path / f"new.{kind}"
    target.write_bytes(b"old" * 512)
    real_pwrite = FileNode.pwrite

    async def filling(node: FileNode, offset: int, data: Buffer, serialising: bool = False) -> None:
        if offset > 100 * KiB:
            raise IoError(errno.ENOSPC, "disk", "write", offset, len(data))
        await real_pwrite(node, offset, data, serialising)

    monkeypatch.setattr(FileNode, "pwrite", filling)
    monkeypatch.setattr(FileNode, "writer", Node.writer)
    with pytest.raises(IoError, match="No space left on device"):
        await images.restore(backup, str(target), force=True)
    assert target.read_bytes() == b"old" * 512
    assert sorted(os.listdir(tmp_path)) == ["backup.raw", target.name]


async def test_a_link_is_followed_to_what_is_replaced(tmp_path: Path, backup: str) -> None:
    (tmp_path / "real.raw").write_bytes(b"old")
    (tmp_path / "link.raw").symlink_to("real.raw")
    await images.restore(backup, str(tmp_path / "link.raw"), force=True)
    assert (tmp_path / "link.raw").is_symlink()
    assert content(tmp_path / "real.raw") == content(backup)


async def test_a_backup_with_a_backing_file_is_restored_whole_where_that_may_be_opened(
    tmp_path: Path, backup: str
) -> None:
    (tmp_path / "layers").mkdir()
    layer = tmp_path / "layers" / "top.qcow2"
    graph = Graph()
    try:
        storage = await create_file(str(layer))
        graph.add(FileNode("file", storage), named=True)
        edge = graph.attach(graph.find("file"), "test", "file", writable=True, may_grow=True)
        await create_qcow2(edge, os.path.getsize(backup), backing_file=backup, backing_format="raw")
        graph.forget(edge)
    finally:
        await graph.close()
    with pytest.raises(UnsupportedFormat, match=f"--allow-backing '{tmp_path}' would allow it"):
        await images.restore(str(layer), str(tmp_path / "new.raw"))
    await images.restore(str(layer), str(tmp_path / "new.raw"), allow_backing=(str(tmp_path),))
    assert content(tmp_path / "new.raw") == content(backup)


async def test_a_target_whose_format_nothing_tells_is_refused(tmp_path: Path, backup: str) -> None:
    with pytest.raises(UsageError, match="format not given, and its ending tells none"):
        await images.restore(backup, str(tmp_path / "new"))
