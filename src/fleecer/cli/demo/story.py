"""What the demo does, in order, and what it tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fleecer.app import images
from fleecer.app.rundir import NBD_SOCKET, QMP_SOCKET
from fleecer.cli.demo.blockmap import PRESERVED_CONTEXT, draw, read_map
from fleecer.cli.demo.disk import DATABASE_BYTES, TAIL_BYTES, Disk, make_disk, run_tool, tool
from fleecer.cli.demo.proof import prove
from fleecer.cli.demo.writer import IN_FLIGHT, Writer
from fleecer.cli.qmp_client import QmpClient
from fleecer.errors import FleecerError
from fleecer.net.nbd_client import ALLOCATION, NbdClient
from fleecer.net.stream import connect_unix
from fleecer.units import MiB, format_size

Tell = Callable[[str], Any]

NAME = "disk"
WRITES_BEFORE = 4000


async def tell(say: Tell) -> None:
    """Runs the demo. Raises FleecerError if anything fails, the proof before all. Leaves nothing behind."""
    begun_s = time.monotonic()
    fsck = tool("e2fsck", "e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="fleecer-demo-") as directory:
        disk = await make_disk(directory)
        say(f"A disk of {format_size(disk.size)} with an ext4 file system and files in it: {disk.path}")
        first = os.path.join(directory, "first.raw")
        await asyncio.to_thread(_copy_sparsely, disk.path, first)
        async with _daemon(directory, disk, say) as run_directory:
            await _act(say, disk, directory, run_directory, first, fsck)
    say(f"Proven in {time.monotonic() - begun_s:.0f} s; nothing is left behind.")


async def _act(say: Tell, disk: Disk, directory: str, run_directory: str, first: str, fsck: str) -> None:
    socket_path = os.path.join(run_directory, NBD_SOCKET)
    client = await NbdClient.connect(await connect_unix(socket_path), NAME)
    writer = Writer(client, disk.database, disk.tail)
    journal = writer.journal
    writer.start()
    try:
        await writer.until(WRITES_BEFORE)
        area = format_size(DATABASE_BYTES + TAIL_BYTES)
        say(f"A client overwrites {area} of it, {IN_FLIGHT} writes in flight at any time: the blocks of a database,")
        say("    and space that was never used. It never pauses.")

        qmp = await asyncio.to_thread(QmpClient, os.path.join(run_directory, QMP_SOCKET))
        with qmp:
            asked = journal.tick()
            began_s = time.monotonic()
            taken = await asyncio.to_thread(qmp.execute, "snapshot-create", {"disks": [NAME]})
            took_ms = (time.monotonic() - began_s) * 1000
            answered = journal.mark()
            say(f"$ fleecer snapshot create {NAME}")
            say(f"    {NAME}@{taken['name']}: there in {took_ms:.1f} ms, after {journal.count} writes")
            export = taken["disks"][0]["export"]

            await _show_map(say, socket_path, export)

            count = journal.count
            backup = await images.back_up(socket_path, export, os.path.join(directory, "backups", NAME), taken["name"])
            say(f"$ fleecer backup {NAME} --to backups")
            say(
                f"    {backup.path.removeprefix(directory + os.sep)}: {format_size(backup.bytes_written)} of data in "
                f"{backup.seconds:.1f} s, {journal.count - count} writes to the disk meanwhile"
            )
            await writer.until_overwritten()
            say(
                f"By now the client has overwritten every one of its blocks since the snapshot; {journal.count} writes."
            )
            await _show_map(say, socket_path, export)
            await _compare(say, backup.path, socket_path, export, directory)
            await asyncio.to_thread(qmp.execute, "snapshot-delete", {"name": taken["name"]})
        await writer.stop()
    finally:
        await _end_writer(writer, client)
    restored = os.path.join(directory, "restored.raw")
    await images.restore(backup.path, restored)
    say("$ fleecer restore backups/... restored.raw")
    say("    read back and compared")
    await run_tool(fsck, "-f", "-n", restored)
    say("    e2fsck -f -n: the file system in it is sound")
    verdict = await asyncio.to_thread(prove, restored, first, journal, asked, answered)
    say(f"The writer's own journal says of the {verdict.blocks} blocks in the restored image:")
    say(f"    {verdict.written} hold the last write before the instant, whole; the rest is as it was at first;")
    say(f"    of {verdict.later} writes issued after it there is none; {verdict.in_flight} were in flight around it.")


async def _end_writer(writer: Writer, client: NbdClient) -> None:
    """Ends what `_act` has under way, however it ended."""
    with contextlib.suppress(FleecerError):
        await writer.stop()
    await client.close()


async def _show_map(say: Tell, socket_path: str, export: str) -> None:
    client = await NbdClient.connect(await connect_unix(socket_path), export, contexts=(ALLOCATION, PRESERVED_CONTEXT))
    try:
        runs = await read_map(client)
    finally:
        await client.close()
    for line in draw(runs, client.info.size):
        say(f"    {line}")


async def _compare(say: Tell, backup: str, socket_path: str, export: str, directory: str) -> None:
    """The backup against the snapshot, by us, and by qemu-img where it is installed."""
    await images.check_equal(backup, socket_path, export)
    say("    The backup equals the snapshot, byte for byte (our own comparison)")
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        say("    qemu-img is not installed: its opinion is not asked")
        return
    await run_tool(qemu_img, "check", "-q", backup)
    uri = f"nbd+unix:///{export}?socket={socket_path}"
    await run_tool(qemu_img, "compare", "-q", "-f", "qcow2", "-F", "raw", backup, uri)
    say("    qemu-img check and qemu-img compare say the same")


@contextlib.asynccontextmanager
async def _daemon(directory: str, disk: Disk, say: Tell) -> AsyncIterator[str]:
    """A daemon that serves the disk, in a process of its own; ended in order. Gives its run directory."""
    run_directory = os.path.join(directory, "run")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "fleecer", "serve", f"{NAME}={disk.path}", "--run-dir", run_directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us; the daemon is ended when nothing needs it any more
    )
    try:
        assert process.stdout is not None, "it was asked for"
        line = await process.stdout.readline()
        if not line:
            raise FleecerError("the daemon did not start; what it said is above")
        say(f"$ fleecer serve {NAME}=disk.raw\n    {line.decode().strip()}")
        yield run_directory
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)  # `terminate` could lose the status of one that just ended
        status = await process.wait()
    if status:
        raise FleecerError(f"the daemon ended with status {status}")


def _copy_sparsely(source: str, target: str) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:
        while piece := old.read(MiB):
            if piece.count(0) == len(piece):
                new.seek(len(piece), os.SEEK_CUR)
            else:
                new.write(piece)
        new.truncate(old.tell())
