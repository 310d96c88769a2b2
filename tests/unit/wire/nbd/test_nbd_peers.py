"""Both codecs against other people's NBD programs, over a plain blocking Unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.nbd_world import Shelf, sent

from fleecer.ranges import is_zero
from fleecer.units import KiB, MiB
from fleecer.wire.nbd import ClientCodec, ExportInfo, ExportUnknown, Reply, Request, ServerCodec
from fleecer.wire.nbd import constants as nbd
from fleecer.wire.nbd.client_handshake import Mode

pytestmark = pytest.mark.peer

SIZE = 4 * MiB
DISK = ExportInfo(
    name="disk",
    description="a disk in memory",
    size=SIZE,
    can_multi_conn=True,
    can_trim=True,
    can_fast_zero=True,
    contexts=("base:allocation", "x-test:other"),
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


# Our server, their clients.


class Disk:
    """A disk in memory that is served by the codec; one thread a connection."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(SIZE)
        self.failures: list[BaseException] = []
        self.commands: set[int] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        codec = ServerCodec(Shelf(DISK, ExportInfo(name="", size=SIZE, read_only=True)))
        # A client that has said ABORT or DISC may be gone before it is answered.
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                connection.sendall(sent(codec))
                if codec.finished:
                    break
                count = connection.recv_into(codec.receive_buffer())
                if not count:
                    break
                for request in codec.received(count):
                    self._answer(codec, request)
            if codec.failure is not None:
                self.failures.append(codec.failure)

    def _answer(self, codec: ServerCodec, request: Request) -> None:
        self.commands.add(request.command)
        start, end = request.offset, request.offset + request.length
        if request.error:
            codec.reply_error(request, request.error, request.message)
        elif request.command == nbd.CMD_READ:
            data = bytes(self.data[start:end])
            if is_zero(data) and codec.may_fragment(request):
                codec.reply_read_hole(request)
            else:
                codec.reply_read(request, data)
        elif request.command == nbd.CMD_BLOCK_STATUS:
            steps = range(start, end, 64 * KiB)
            runs = [(min(64 * KiB, end - at), 3 * is_zero(self.data[at : at + 64 * KiB])) for at in steps]
            codec.reply_status(request, [(context, runs) for context in codec.contexts])
        else:
            if request.command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES):
                self.data[start:end] = request.data or bytes(end - start)
            codec.reply_done(request)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    served = Disk(tmp_path / "nbd.sock")
    yield served
    served.close()
    assert served.failures == []


def test_nbdinfo_sees_what_is_offered(disk: Disk) -> None:
    told = json.loads(run("nbdinfo", "--json", "--list", f"nbd+unix:///?socket={disk.path}"))
    first, second = sorted(told["exports"], key=lambda export: str(export["export-name"]), reverse=True)
    assert first["export-name"] == "disk"
    assert first["description"] == "a disk in memory"
    assert first["export-size"] == SIZE
    assert first["contexts"] == ["base:allocation", "x-test:other"]
    assert first["can_multi_conn"]
    assert first["can_df"]
    assert first["can_fast_zero"]
    assert first["block_size_maximum"] == 32 * MiB
    assert second["export-name"] == ""
    assert second["is_read_only"]


def test_nbdcopy_writes_and_reads_the_same_bytes(disk: Disk, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = bytearray(SIZE)
    content[300_000:700_000] = bytes(k % 241 for k in range(400_000))
    source.write_bytes(content)
    uri = f"nbd+unix:///disk?socket={disk.path}"
    run("nbdcopy", "--flush", str(source), uri)
    assert disk.data == content
    run("nbdcopy", uri, str(target))
    assert target.read_bytes() == content
    assert {nbd.CMD_WRITE, nbd.CMD_FLUSH, nbd.CMD_READ, nbd.CMD_BLOCK_STATUS} <= disk.commands


def test_nbdinfo_maps_block_status(disk: Disk) -> None:
    disk.data[64 * KiB : 192 * KiB] = b"x" * (128 * KiB)
    extents = json.loads(run("nbdinfo", "--json", "--map", f"nbd+unix:///disk?socket={disk.path}"))
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in extents] == [
        (0, 64 * KiB, 3),
        (64 * KiB, 128 * KiB, 0),
        (192 * KiB, SIZE - 192 * KiB, 3),
    ]


def test_qemu_io_writes_reads_zeroes_discards_and_flushes(disk: Disk) -> None:
    commands = ["write -P 7 -f 4096 8192", "write -z 8192 4096", "discard 65536 65536", "flush", "read -P 7 4096 4096"]
    arguments = [argument for command in commands for argument in ("-c", command)]
    output = run("qemu-io", "-f", "raw", *arguments, f"nbd+unix:///disk?socket={disk.path}")
    assert "Pattern verification failed" not in output
    assert disk.data[4096:8192] == b"\7" * 4096
    assert is_zero(disk.data[8192:12288])
    assert {nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES, nbd.CMD_TRIM, nbd.CMD_FLUSH, nbd.CMD_READ} <= disk.commands


def test_qemu_img_maps_what_is_allocated(disk: Disk) -> None:
    disk.data[0 : 64 * KiB] = b"x" * (64 * KiB)
    told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", f"nbd+unix:///disk?socket={disk.path}"))
    assert [(extent["start"], extent["length"], extent["zero"]) for extent in told] == [
        (0, 64 * KiB, False),
        (64 * KiB, SIZE - 64 * KiB, True),
    ]


def test_qemu_is_told_when_an_export_does_not_exist(disk: Disk) -> None:
    done = subprocess.run(
        ["qemu-img", "info", f"nbd+unix:///nowhere?socket={disk.path}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "export 'nowhere' is not available" in done.stderr


# Their servers, our client.


@contextlib.contextmanager
def serving(path: Path, *command: str) -> Iterator[None]:
    """Runs a server in the foreground until its socket takes connections, and ends it."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            while process.poll() is None:
                with (
                    contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
                    socket.socket(socket.AF_UNIX) as probe,
                ):
                    probe.connect(str(path))
                    break
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            yield
        finally:
            process.terminate()


def talk(path: Path, codec: ClientCodec, *asks: Callable[[], int]) -> list[Reply]:
    """Connects, negotiates, sends the requests together, and returns their replies in the order asked."""
    pending = list(asks)
    replies: dict[int, Reply] = {}
    cookies: list[int] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        while not codec.finished:
            count = connection.recv_into(codec.receive_buffer())
            if not count:
                codec.eof()
                break
            replies.update((reply.cookie, reply) for reply in codec.received(count))
            if codec.ready and pending:
                cookies = [ask() for ask in pending]
                pending.clear()
            elif codec.ready and not codec.in_flight:
                codec.disconnect()
            connection.sendall(sent(codec))
    return [replies[cookie] for cookie in cookies]


def exercise(path: Path, codec: ClientCodec) -> None:
    payload = bytes(k % 239 for k in range(300 * KiB))
    replies = talk(path, codec, lambda: codec.write(64 * KiB, payload), codec.flush)
    assert codec.failure is None
    assert [reply.error for reply in replies] == [0, 0]


@pytest.mark.parametrize("peer", ["qemu-nbd", "nbdkit"])
def test_we_read_write_and_map_what_others_serve(peer: str, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "nbd.sock"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(SIZE)
    if peer == "qemu-nbd":
        command = ["qemu-nbd", "-t", "-f", "raw", "-k", str(path), "-x", "disk", "-D", "their disk", str(image)]
        command += ["--discard=unmap", "--detect-zeroes=off", "-e", "4"]
    else:
        command = ["nbdkit", "-f", "--unix", str(path), "file", str(image)]
    with serving(path, *command):
        exercise(path, ClientCodec("disk"))
        codec = ClientCodec("disk")
        replies = talk(
            path,
            codec,
            lambda: codec.read(64 * KiB, 300 * KiB),
            lambda: codec.read(0, 1 * MiB),
            lambda: codec.block_status(0, SIZE),
        )
        assert codec.failure is None
        assert [reply.error for reply in replies] == [0] * 3
        payload = bytes(k % 239 for k in range(300 * KiB))
        assert replies[0].data == payload
        assert replies[1].data == bytes(64 * KiB) + payload + bytes(1 * MiB - 364 * KiB)
        extents = replies[2].extents["base:allocation"]
        assert extents[0] == (64 * KiB, 3)
        assert sum(length for length, _ in extents) == SIZE
        zeroing = ClientCodec("disk")
        replies = talk(
            path,
            zeroing,
            lambda: zeroing.write_zeroes(64 * KiB, 64 * KiB, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE),
            lambda: zeroing.trim(2 * MiB, 64 * KiB),
        )
        assert zeroing.failure is None
        assert [reply.error for reply in replies] == [0, 0]
    assert image.read_bytes()[64 * KiB : 364 * KiB] == bytes(64 * KiB) + payload[64 * KiB :]


@pytest.mark.parametrize("mode", ["list", "info", "go"])
def test_qemu_nbd_answers_every_mode(mode: Mode, tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "nbd.sock"
    image.write_bytes(bytes(SIZE))
    options = ["-t", "-r", "-f", "raw", "-x", "disk", "-D", "their disk", "-k", str(path)]
    with serving(path, "qemu-nbd", *options, str(image)):
        codec = ClientCodec("other" if mode == "go" else "disk", mode=mode)
        talk(path, codec)
    if mode == "list":
        assert codec.listed == [("disk", "their disk")]
    elif mode == "info":
        assert codec.info is not None
        assert (codec.info.description, codec.info.read_only) == ("their disk", True)
        assert "base:allocation" in codec.info.contexts
    else:
        assert isinstance(codec.failure, ExportUnknown)


def test_an_old_server_is_used_by_export_name(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with serving(path, "nbdkit", "-f", "--mask-handshake=0", "--unix", str(path), "pattern", str(SIZE)):
        codec = ClientCodec("any")
        (reply,) = talk(path, codec, lambda: codec.read(4096, 16))
    assert not codec.structured
    assert reply.data == b"".join(offset.to_bytes(8, "big") for offset in (4096, 4104))
