"""The QMP client against servers that say what a test wants."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleecer.cli import qmp_client
from fleecer.cli.qmp_client import QmpClient
from fleecer.errors import IoError, RemoteProtocolError, UsageError
from fleecer.wire.qmp import QmpError

GREETING = b'{"QMP": {"version": {"qemu": {"major": 9}, "package": ""}, "capabilities": ["oob"]}}\r\n'
Start = Callable[[list[bytes]], str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Start]:
    """Starts a server that greets, then gives one answer to each command it receives, then closes."""
    threads: list[threading.Thread] = []

    def start(answers: list[bytes]) -> str:
        path = str(tmp_path / f"{len(threads)}.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as peer:
                peer.sendall(answers[0])
                for answer in answers[1:]:
                    if not peer.recv(65536):
                        return
                    peer.sendall(answer)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join()


def test_commands_are_answered_past_events_and_pieces(serve: Start) -> None:
    path = serve(
        [
            GREETING,
            b'{"event": "X", "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}} {"return": {}, "id": 1}',
            b'{"event": "Y"}\n{"return": {"a": [1]}, "id": 2}',
        ]
    )
    with QmpClient(path) as client:
        assert not client.is_fleecer
        assert client.execute("query-a") == {"a": [1]}


def test_an_error_is_raised_with_the_servers_words(serve: Start) -> None:
    path = serve([GREETING, b'{"return": {}, "id": 1}', b'{"error": {"class": "GenericError", "desc": "no"}, "id": 2}'])
    with QmpClient(path) as client, pytest.raises(QmpError, match=r"^no$"):
        client.execute("x")


def test_nobody_there_tells_how_to_start_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        QmpClient(str(tmp_path / "qmp.sock"))
    expected = f"there is no daemon at '{tmp_path}/qmp.sock'; start one with: fleecer serve [NAME=]IMAGE..."
    assert str(caught.value) == expected


def test_a_server_that_closes_is_told_of(serve: Start) -> None:
    with QmpClient(serve([GREETING, b'{"return": {}, "id": 1}'])) as client, pytest.raises(IoError) as caught:
        client.execute("x")
    assert "the daemon has closed the connection" in str(caught.value)


def test_what_is_no_qmp_server_is_told_of(serve: Start) -> None:
    with pytest.raises(
        RemoteProtocolError, match=r"a message must be a JSON object|no return, error, event or greeting"
    ):
        QmpClient(serve([b"220 smtp.example.com ESMTP\r\n"]))
    with pytest.raises(RemoteProtocolError, match="did not greet as a QMP server does"):
        QmpClient(serve([b'{"return": {}}']))


def test_a_server_that_says_nothing_is_given_up(serve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp_client, "ANSWER_TIMEOUT_S", 0.01)
    with pytest.raises(IoError, match=r"no answer in 0.01 s; is it a QMP server, and free\?"):
        QmpClient(serve([b"", b""]))


def test_a_path_that_is_too_long_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bytes, more than the 107 that the system takes; choose a shorter one"):
        QmpClient(str(tmp_path / ("x" * 120)))


def test_a_client_that_is_busy_otherwise_need_not_be_cut_off_for_events_it_does_not_read(tmp_path: Path) -> None:
    path = str(tmp_path / "busy.sock")
    events = b'{"event": "X", "data": {}}\r\n' * 100_000  # far more than sockets hold
    all_sent = threading.Event()

    def run() -> None:
        with listener, listener.accept()[0] as peer:
            peer.sendall(GREETING)
            peer.recv(65536)
            peer.sendall(b'{"return": {}, "id": 1}' + events)
            all_sent.set()
            peer.recv(65536)
            peer.sendall(b'{"return": "answer", "id": 2}')

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    server = threading.Thread(target=run)
    server.start()
    with QmpClient(path) as client:
        while not all_sent.is_set():
            client.pass_over_events()
        assert client.execute("x") == "answer"
        server.join()
        client.pass_over_events()  # it has closed: that is not for this call to tell
        with pytest.raises(IoError, match="the daemon has closed the connection"):
            client.execute("y")
