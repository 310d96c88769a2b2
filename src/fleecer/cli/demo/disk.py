"""The demo's disk: an ext4 file system with real files in it, then space that belongs to no file system.

The writer gets the blocks of one large file, as a database would rewrite them, and the space at the end, which is a
hole at first. Overwriting those leaves the file system sound, whatever is written.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from typing import NamedTuple

from fleecer.errors import FleecerError, UsageError
from fleecer.units import KiB, MiB

BLOCK_BYTES = 4 * KiB
FILE_SYSTEM_BYTES = 128 * MiB
TAIL_BYTES = 32 * MiB
DATABASE_BYTES = 16 * MiB
_DOCUMENTS = 200
_TOOL_DIRECTORIES = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Disk(NamedTuple):
    """The image file, its size, and the numbers of the blocks that the writer may have."""

    path: str
    size: int
    database: list[int]
    tail: list[int]


def tool(name: str, package: str) -> str:
    """Where a program is. Raises UsageError that tells what to install."""
    path = shutil.which(name, path=_TOOL_DIRECTORIES)
    if path is None:
        raise UsageError(f"the demo needs {name}, which is not installed: apt-get install {package}")
    return path


async def run_tool(*command: str) -> str:
    """Runs a program and returns its output. Raises FleecerError with its last words if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode:
        words = " ".join((err or out).decode(errors="replace").split())[-500:]
        raise FleecerError(f"{os.path.basename(command[0])} failed with status {process.returncode}: {words}")
    return out.decode(errors="replace")


async def make_disk(directory: str) -> Disk:
    """Makes the disk's image in `directory`. Raises UsageError where a program is missing."""
    mkfs, debugfs = tool("mkfs.ext4", "e2fsprogs"), tool("debugfs", "e2fsprogs")
    files = os.path.join(directory, "files")
    await asyncio.to_thread(_make_files, files)
    path = os.path.join(directory, "disk.raw")
    size = FILE_SYSTEM_BYTES + TAIL_BYTES
    with open(path, "xb") as image:  # noqa: ASYNC230 - it makes an empty file
        image.truncate(size)
    await run_tool(mkfs, "-q", "-F", "-b", str(BLOCK_BYTES), "-d", files, path, f"{FILE_SYSTEM_BYTES // KiB}k")
    listed = await run_tool(debugfs, "-R", "blocks /database", path)
    database = [int(number) for number in listed.split()]
    await asyncio.to_thread(_check_database, path, os.path.join(files, "database"), database)
    tail = range(FILE_SYSTEM_BYTES // BLOCK_BYTES, size // BLOCK_BYTES)
    return Disk(path, size, database, list(tail))


def _make_files(directory: str) -> None:
    content = random.Random("demo")  # noqa: S311 - it fills files
    os.makedirs(os.path.join(directory, "documents"))
    for number in range(_DOCUMENTS):
        with open(os.path.join(directory, "documents", f"{number:03}.txt"), "wb") as file:
            file.write(content.randbytes(content.randrange(1, 200 * KiB)))
    with open(os.path.join(directory, "database"), "wb") as file:
        file.write(content.randbytes(DATABASE_BYTES))


def _check_database(image_path: str, file_path: str, blocks: list[int]) -> None:
    """Sees for itself that these blocks hold that file, and nothing else will be overwritten."""
    with open(image_path, "rb") as image, open(file_path, "rb") as file:
        for block in blocks:
            image.seek(block * BLOCK_BYTES)
            if image.read(BLOCK_BYTES) != file.read(BLOCK_BYTES):
                raise FleecerError(f"debugfs named block {block} as the database's, which holds something else")
        if len(blocks) * BLOCK_BYTES != DATABASE_BYTES:
            raise FleecerError(
                f"debugfs named {len(blocks)} blocks of the database, not {DATABASE_BYTES // BLOCK_BYTES}"
            )
