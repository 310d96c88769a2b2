"""Listening sockets: who may reach them, what is in their place, and running out of descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from fleecer.errors import IoError, UsageError
from fleecer.net import listen
from fleecer.net.listen import listen_tcp, listen_unix, parse_host_port
from fleecer.net.stream import SocketStream, connect_tcp, connect_unix


class Door:
    """Takes what a listener accepts."""

    def __init__(self) -> None:
        self.streams: list[SocketStream] = []
        self._came = asyncio.Event()

    def __call__(self, stream: SocketStream) -> None:
        self.streams.append(stream)
        self._came.set()

    async def come(self, count: int) -> None:
        while len(self.streams) < count:
            self._came.clear()
            await self._came.wait()

    def close(self) -> None:
        for stream in self.streams:
            stream.abort()


async def test_a_unix_socket_is_its_owners_alone_from_the_first_instant(tmp_path: Path) -> None:
    path = tmp_path / "s"
    modes: list[int] = []
    listening = socket.socket.listen

    def look(self: socket.socket, *backlog: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        listening(self, *backlog)

    umask = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "listen", look)
            listener = listen_unix(str(path), Door())
        assert os.umask(0) == 0, "the umask was not put back"
    finally:
        os.umask(umask)
    assert modes == [0o600]
    listener.close()
    listener.close()
    assert not path.exists()


async def test_connections_are_handed_over(tmp_path: Path) -> None:
    door = Door()
    unix = listen_unix(str(tmp_path / "s"), door)
    tcp = listen_tcp("127.0.0.1", 0, door)
    clients = [await connect_unix(unix.name) for _ in range(3)]
    clients.append(await connect_tcp(*tcp.address[:2]))
    await door.come(4)
    for stream in (*clients, *door.streams):
        stream.abort()
    unix.close()
    tcp.close()


async def test_a_socket_left_by_a_crash_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    listener = listen_unix(path, Door())
    (await connect_unix(path)).abort()
    listener.close()


async def test_a_socket_that_is_answered_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen_unix(path, Door())
    with pytest.raises(UsageError, match=rf"^socket '{path}' is served by this daemon already; choose another"):
        listen_unix(path, Door())
    (await connect_unix(path)).abort()
    listener.close()


async def test_a_socket_whose_owner_is_too_busy_to_answer_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    def too_busy(self: socket.socket, address: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket.socket, "connect", too_busy)
    with pytest.raises(UsageError, match="is in use by another process"):
        listen_unix(str(path), Door())
    assert path.exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
async def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists and is not a socket of ours; remove it or choose another path"):
        listen_unix(str(path), Door())
    assert path.is_symlink() or path.exists()


async def test_closing_does_not_remove_a_socket_that_took_the_place_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_unix(str(path), Door())
    path.rename(tmp_path / "moved")
    second = listen_unix(str(path), Door())
    first.close()
    assert path.exists()
    second.close()


@pytest.mark.parametrize(("uid", "let_in"), [(1234, True), (0, True), (1235, False)])
async def test_only_this_user_and_root_are_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, let_in: bool
) -> None:
    door = Door()

    def let_in_and_out(stream: SocketStream) -> None:
        door(stream)
        stream.abort()

    listener = listen_unix(str(tmp_path / "s"), let_in_and_out, same_user_only=True)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(listen, "_peer", lambda sock: (1, uid, 1))
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, str(tmp_path / "s"))
        assert await loop.sock_recv(sock, 1) == b""  # either way it ends, let in or not
    assert bool(door.streams) == let_in
    listener.close()


async def test_the_kernel_tells_who_is_at_the_other_end() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert listen._peer(left) == (os.getpid(), os.geteuid(), os.getegid())


async def test_without_descriptors_accepting_pauses_and_nobody_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "_PAUSE_S", 0.01)
    door = Door()
    listener = listen_unix(str(tmp_path / "s"), door)
    accept, failures = socket.socket.accept, [errno.EMFILE, errno.ENFILE]

    def without_descriptors(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise OSError(failures.pop(), "no descriptors")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", without_descriptors)
    client = await connect_unix(str(tmp_path / "s"))
    await door.come(1)
    assert not failures
    door.close()
    client.abort()
    listener.close()


async def test_closing_while_accepting_is_paused_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "_PAUSE_S", 0.01)
    listener = listen_unix(str(tmp_path / "s"), Door())
    tried = asyncio.Event()

    def without_descriptors(self: socket.socket) -> tuple[socket.socket, object]:
        tried.set()
        raise OSError(errno.EMFILE, "no descriptors")

    monkeypatch.setattr(socket.socket, "accept", without_descriptors)
    client = await connect_unix(str(tmp_path / "s"))
    await tried.wait()
    listener.close()
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    await asyncio.sleep(0.03)
    assert not problems
    client.abort()


async def test_an_address_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            IoError, match=rf"^listen on '127\.0\.0\.1:{port}': this daemon or another program listens there"
        ):
            listen_tcp("127.0.0.1", port, Door())
    with pytest.raises(IoError, match=r"^listen on '.*/absent/s': No such file or directory$"):
        listen_unix(str(tmp_path / "absent" / "s"), Door())
    with pytest.raises(UsageError, match="more than the 107 that the system takes"):
        listen_unix(str(tmp_path / ("x" * 150)), Door())


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("localhost", ("localhost", 7)),
        ("localhost:80", ("localhost", 80)),
        (":80", ("", 80)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", 7)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
    ],
)
def test_addresses_are_parsed(text: str, parsed: tuple[str, int]) -> None:
    assert parse_host_port(text, 7) == parsed


@pytest.mark.parametrize("port", ["http", "65536", "-1", "", "\u0663", "9" * 9999])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match="is not a number up to 65535, as in 127"):
        parse_host_port(f"localhost:{port}", 7)
