"""The composition root: names, the order of the end, and what a failed end does."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fleecer.app import signals
from fleecer.app.serving import Disk, ServeOptions, disk_named, serve, service
from fleecer.daemon import Daemon
from fleecer.errors import FleecerError, UsageError
from fleecer.monitor import MonitorServer
from fleecer.units import MiB


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("web.qcow2", "web", "web.qcow2"),
        ("/images/web.v2.raw", "web.v2", "/images/web.v2.raw"),
        ("data=web.raw", "data", "web.raw"),
        ("data=/images/a=b.raw", "data", "/images/a=b.raw"),
        ("/images/a=b.raw", "a=b", "/images/a=b.raw"),
        ("./a=b.raw", "a=b", "./a=b.raw"),
        ("=a.raw", "", "a.raw"),
    ],
)
def test_a_disk_has_the_name_given_or_its_files(text: str, name: str, path: str) -> None:
    assert disk_named(text, None) == Disk(name, path, None)


def options(directory: Path) -> ServeOptions:
    (directory / "a.raw").write_bytes(bytes(MiB))
    return ServeOptions([Disk("a", str(directory / "a.raw"))], str(directory / "run"))


async def test_a_disk_is_announced_once_it_can_be_reached(tmp_path: Path) -> None:
    lines: list[str] = []

    def announce(line: str) -> None:
        lines.append(line)
        assert sorted(os.listdir(tmp_path / "run")) == ["daemon.lock", "nbd.sock", "qmp.sock"]
        os.kill(os.getpid(), signal.SIGTERM)

    await serve(options(tmp_path), announce)
    assert lines == [f"a  nbd+unix:///a?socket={tmp_path}/run/nbd.sock"]
    assert os.listdir(tmp_path / "run") == ["daemon.lock"]


async def test_what_fails_at_the_start_leaves_no_socket(tmp_path: Path) -> None:
    wrong = ServeOptions([*options(tmp_path).disks, Disk("b", str(tmp_path / "absent.raw"))], str(tmp_path / "run"))
    with pytest.raises(FleecerError, match="does not exist"):
        await serve(wrong, pytest.fail)
    assert os.listdir(tmp_path / "run") == ["daemon.lock"]


async def test_names_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="disk name"):
        await serve(ServeOptions([Disk("a/b", "x.raw")], str(tmp_path / "run")), pytest.fail)
    assert os.listdir(tmp_path) == []


async def test_the_end_is_in_order_and_the_monitor_outlives_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    for owner, name in ((MonitorServer, "refuse"), (Daemon, "close"), (MonitorServer, "close")):
        real = getattr(owner, name)

        def wrapped(self: object, real: object = real, label: str = f"{owner.__name__}.{name}") -> object:
            steps.append(label)
            return real(self)  # type: ignore[operator]

        monkeypatch.setattr(owner, name, wrapped)
    async with service(Daemon()):
        pass
    assert steps[:3] == ["MonitorServer.refuse", "Daemon.close", "MonitorServer.close"]


async def test_a_failed_last_flush_is_raised_and_the_monitor_closed_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []
    real_close = MonitorServer.close

    async def failing(_: Daemon) -> None:
        raise FleecerError("flush on 'a': Input/output error")

    async def close(self: MonitorServer) -> None:
        closed.append(True)
        await real_close(self)

    monkeypatch.setattr(Daemon, "close", failing)
    monkeypatch.setattr(MonitorServer, "close", close)
    with pytest.raises(FleecerError, match="flush on 'a'"):
        async with service(Daemon()):
            pass
    assert closed == [True]


async def test_a_signal_asks_for_the_end_and_signals_are_heeded_after_it(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with service(Daemon()) as running:
        os.kill(os.getpid(), signal.SIGTERM)
        await running.stopped()
    for number in signals.STOP_SIGNALS:
        assert loop.remove_signal_handler(number), "what hangs after the end must not be cut short by a stray signal"


async def test_one_file_under_two_names_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(MiB))
    (tmp_path / "link.raw").symlink_to("a.raw")
    disks = [Disk("a", str(tmp_path / "a.raw")), Disk("b", str(tmp_path / "link.raw"))]
    with pytest.raises(UsageError, match="are the same file; serve it once, or all with --read-only"):
        await serve(ServeOptions(disks, str(tmp_path / "run")), pytest.fail)
    assert not (tmp_path / "run").exists()


async def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"disk name '\\udcff' is not UTF-8, as NBD wants"):
        await serve(ServeOptions([Disk("\udcff", "x.raw")], str(tmp_path / "run")), pytest.fail)
