"""Image locks: between our own opens, and with QEMU's tools in both directions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from fleecer.errors import IoError, PermissionConflict
from fleecer.storage.file import create_file, open_file
from fleecer.storage.pool import running_pool

HELD_FOR_WRITING = "another process holds it for writing (lock); stop it first"


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[str]:
    (tmp_path / "disk0.raw").write_bytes(bytes(1 << 20))
    yield str(tmp_path / "disk0.raw")
    await running_pool().close()


def held_bytes(path: str) -> set[int]:
    """Which bytes of the file are locked by anyone."""
    inode = os.stat(path).st_ino
    held: set[int] = set()
    with open("/proc/locks") as lines:
        for line in lines:
            fields = line.split()
            if fields[-3].endswith(f":{inode}"):
                held.update(range(int(fields[-2]), int(fields[-1]) + 1))
    return held


async def test_each_opener_holds_the_bytes_of_its_permissions(path: str) -> None:
    writer = await open_file(path)
    assert held_bytes(path) == {100, 101, 103, 201, 203}
    await writer.close()
    reader = await open_file(path, read_only=True)
    assert held_bytes(path) == {100, 201, 203}
    await reader.close()
    lenient = await open_file(path, read_only=True, force_share=True)
    assert held_bytes(path) == {100}
    await lenient.close()
    assert held_bytes(path) == set()


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("writer", "writer", HELD_FOR_WRITING),
        (
            "writer",
            "reader",
            HELD_FOR_WRITING,
        ),
        ("writer", "lenient", None),
        ("writer", "careless", None),
        ("reader", "writer", "another process has it open and allows no writing by others (lock); stop it first"),
        ("reader", "reader", None),
        ("reader", "lenient", None),
        ("lenient", "writer", None),
        ("lenient", "reader", None),
    ],
)
async def test_two_openers_in_one_process_coexist_or_the_second_is_told_why(
    path: str, first: str, second: str, text: str | None
) -> None:
    kinds = {
        "writer": {},
        "reader": {"read_only": True},
        "lenient": {"read_only": True, "force_share": True},
        "careless": {"locking": False},
    }
    holder = await open_file(path, **kinds[first])
    before = held_bytes(path)
    if text is None:
        other = await open_file(path, **kinds[second])
        await other.close()
    else:
        with pytest.raises(PermissionConflict) as caught:
            await open_file(path, **kinds[second])
        assert str(caught.value) == f"image '{path}': {text}"
        assert held_bytes(path) == before, "the refused opener left locks behind"
    await holder.close()
    again = await open_file(path)
    await again.close()


async def test_closing_another_descriptor_of_the_file_does_not_lose_the_locks(path: str) -> None:
    """As POSIX locks would."""
    writer = await open_file(path)
    with open(path, "rb"):
        pass
    with pytest.raises(PermissionConflict):
        await open_file(path)
    await writer.close()


async def test_creating_over_an_image_in_use_leaves_its_content_alone(path: str) -> None:
    Path(path).write_bytes(b"precious")
    writer = await open_file(path)
    with pytest.raises(PermissionConflict):
        await create_file(path, exclusive=False)
    assert Path(path).read_bytes() == b"precious"
    await writer.close()


async def test_a_file_system_without_locks_says_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(
        IoError, match=r"lock on '.*': No locks available; if nothing else uses it, open it without lock"
    ):
        await open_file(path)
    monkeypatch.undo()
    storage = await open_file(path, locking=True)
    await storage.close()


# With QEMU's tools.


def qemu_io(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["qemu-io", *arguments], capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def qemu_io_holding(path: str, *arguments: str) -> Iterator[None]:
    """A qemu-io that has the image open, until the end of the block."""
    command = ["qemu-io", *arguments, "-f", "raw", path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while line := process.stdout.readline():
            if "MiB" in line:
                break
        assert process.poll() is None, "qemu-io did not open the image"
        yield
        process.stdin.close()
        process.wait(60)


@pytest.mark.peer
async def test_qemu_cannot_write_to_our_live_image_and_can_read_it_with_force_share(path: str) -> None:
    writer = await open_file(path)
    refused = qemu_io("-f", "raw", "-c", "write 0 512", path)
    assert refused.returncode != 0
    assert 'Failed to get "write" lock' in refused.stderr
    shared = qemu_io("-r", "-U", "-f", "raw", "-c", "read 0 512", path)
    assert shared.returncode == 0, shared.stderr
    info = subprocess.run(["qemu-img", "info", "-U", path], capture_output=True, text=True, timeout=60)
    assert info.returncode == 0, info.stderr
    await writer.close()
    assert qemu_io("-f", "raw", "-c", "write 0 512", path).returncode == 0


@pytest.mark.peer
async def test_qemu_cannot_write_to_an_image_that_we_only_read_but_can_read_it(path: str) -> None:
    reader = await open_file(path, read_only=True)
    refused = qemu_io("-f", "raw", "-c", "write 0 512", path)
    assert 'Failed to get "write" lock' in refused.stderr
    assert qemu_io("-r", "-f", "raw", "-c", "read 0 512", path).returncode == 0
    await reader.close()


@pytest.mark.peer
async def test_we_refuse_an_image_that_qemu_io_writes_to(path: str) -> None:
    with qemu_io_holding(path):
        for read_only in (False, True):
            with pytest.raises(PermissionConflict, match="another process holds it for writing") as caught:
                await open_file(path, read_only=read_only)
            assert "\n" not in str(caught.value)
        lenient = await open_file(path, read_only=True, force_share=True)
        await lenient.close()
    storage = await open_file(path)
    await storage.close()


@pytest.mark.peer
async def test_we_read_beside_a_reading_qemu(path: str) -> None:
    with qemu_io_holding(path, "-r"):
        reader = await open_file(path, read_only=True)
        await reader.close()


@pytest.mark.peer
@pytest.mark.parametrize("format_name", ["raw", "qcow2"])
async def test_we_refuse_an_image_that_qemu_nbd_serves(tmp_path: Path, format_name: str) -> None:
    image, socket, pid_file = str(tmp_path / "disk1"), str(tmp_path / "nbd"), tmp_path / "pid"
    subprocess.run(["qemu-img", "create", "-q", "-f", format_name, image, "1M"], check=True, timeout=60)
    options = ["-f", format_name, "-k", socket, "--fork", "--pid-file", str(pid_file), "--persistent"]
    subprocess.run(["qemu-nbd", *options, image], check=True, timeout=60)
    try:
        for read_only in (False, True):
            with pytest.raises(PermissionConflict, match="another process holds it for writing"):
                await open_file(image, read_only=read_only)
    finally:
        os.kill(int(pid_file.read_text()), 15)
        await running_pool().close()


@pytest.mark.peer
async def test_qemu_nbd_does_not_serve_our_live_image(path: str, tmp_path: Path) -> None:
    writer = await open_file(path)
    command = ["qemu-nbd", "-f", "raw", "-k", str(tmp_path / "nbd"), path]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    await writer.close()
