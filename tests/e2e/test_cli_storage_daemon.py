"""`storage-daemon`: QEMU's options, in the order given, and a fleecing session as QEMU's users drive it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecer.cli.qmp_client import QmpClient
from fleecer.units import MiB
from tests.cli_world import ENVIRONMENT, PROGRAM, TIMEOUT_S, fail, peer, raw_image, run, write

pytestmark = pytest.mark.peer


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """Serves d0.qcow2 as the export guest0, with a monitor at q.sock. Gives the directory."""
    peer("qemu-img", "create", "-q", "-f", "qcow2", "d0.qcow2", "16M", cwd=tmp_path)
    raw_image(tmp_path / "x,y.raw", 100)
    process = subprocess.Popen(
        [
            *PROGRAM,
            "storage-daemon",
            *("--blockdev", "driver=file,node-name=file0,filename=d0.qcow2"),
            *("--blockdev", "driver=qcow2,node-name=disk0,file=file0,discard=unmap"),
            *("--blockdev", '{"driver": "file", "node-name": "odd", "filename": "x,y.raw", "read-only": true}'),
            *("--nbd-server", "addr.type=unix,addr.path=nbd.sock,max-connections=5"),
            "--export=type=nbd,id=guest0,node-name=disk0,name=guest0,writable=on",
            *("--export", "nbd,id=odd,node-name=odd,writable=off"),
            *("--chardev", "socket,id=qmp,path=q.sock,server=on,wait=off", "--monitor", "chardev=qmp"),
            *("--pidfile", "pid"),
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None, process.communicate()[1]
        assert (tmp_path / "pid").read_text() == f"{process.pid}\n"
        yield tmp_path
        with QmpClient(str(tmp_path / "q.sock")) as client:
            client.execute("quit")
        err = process.communicate(timeout=TIMEOUT_S)[1]
        assert not err
        assert process.returncode == 0
        assert not (tmp_path / "pid").exists()
        peer("qemu-img", "check", "-q", "d0.qcow2", cwd=tmp_path)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def uri(directory: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={directory}/nbd.sock"


def test_the_options_give_exports(daemon: Path) -> None:
    write(uri(daemon, "guest0"), "write -P 1 0 1M")
    assert peer("nbdinfo", "--size", uri(daemon, "odd")) == "100\n"


def test_qemus_fleecing_session_works_line_by_line(daemon: Path) -> None:
    write(uri(daemon, "guest0"), "write -P 1 0 4M")
    peer("qemu-img", "create", "-q", "-f", "qcow2", "s0.qcow2", "16M", cwd=daemon)
    with QmpClient(str(daemon / "q.sock")) as client:
        client.execute(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": "scratch0",
                "file": {"driver": "file", "filename": str(daemon / "s0.qcow2")},
                "backing": "disk0",
            },
        )
        backup = {
            "job-id": "fleece0",
            "device": "disk0",
            "target": "scratch0",
            "sync": "none",
            "auto-dismiss": False,
            "filter-node-name": "cbw0",
        }
        client.execute("transaction", {"actions": [{"type": "blockdev-backup", "data": backup}]})
        client.execute(
            "block-export-add",
            {"type": "nbd", "id": "exp0", "node-name": "scratch0", "name": "vd0", "writable": False},
        )
        write(uri(daemon, "guest0"), "write -P 2 0 2M", "write -z 2M 1M")
        peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 4M", "-c", "read -P 0 4M 12M", uri(daemon, "vd0"))
        exports = {export["id"]: export["node-name"] for export in client.execute("query-block-exports")}
        assert exports == {"guest0": "cbw0", "odd": "odd", "exp0": "scratch0"}
        client.execute("block-export-del", {"id": "exp0", "mode": "hard"})
        client.execute("job-cancel", {"id": "fleece0"})
        client.execute("job-dismiss", {"id": "fleece0"})
        client.execute("blockdev-del", {"node-name": "scratch0"})
        assert client.execute("query-jobs") == []
    peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 2 0 2M", "-c", "read -P 0 2M 1M", uri(daemon, "guest0"))


FILE = "driver=file,node-name=f,filename=a.raw"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--blockdev", f"{FILE},cache.direct=on"), "option 'cache' is not known; known are auto-read-only, discard, "),
        (("--blockdev", f"{FILE},read-only=maybe"), "option read-only is 'maybe'; it must be on or off"),
        (
            ("--blockdev", "driver=vmdk,node-name=f"),
            "driver 'vmdk' is not known; known are copy-before-write, delay, fault, file, ",
        ),
        (("--blockdev", "driver=file,filename=a.raw"), "block device options: node-name is missing"),
        (("--blockdev", "driver=raw,node-name=r,file=nothing"), "node 'nothing' does not exist"),
        (
            ("--nbd-server", "addr.type=unix,addr.path=n", "--export", "nbd,id=x,node-name=f"),
            "node 'f' does not exist",
        ),
        (
            ("--blockdev", FILE, "--export", "nbd,id=x,node-name=f"),
            "NBD server not running; use nbd-server-start first",
        ),
        (("--export", "vhost-user-blk,id=x,node-name=f"), "type is 'vhost-user-blk'; it must be nbd"),
        (("--nbd-server", "addr.type=vsock,addr.cid=1"), "addr.type 'vsock' is not known; known are inet, unix"),
        (
            ("--nbd-server", "addr.type=unix,addr.path=n,tls-creds=t"),
            "option 'tls-creds' is not known; known are addr, max-connections",
        ),
        (("--object", "secret,id=s,data=x"), "object type 'secret' is not supported, nor is any other yet"),
        (("--chardev", "stdio,id=c"), "chardev backend 'stdio' is not supported; socket is, with path=PATH"),
        (("--chardev", "socket,id=c,path=p,server=on,wait=on"), "chardev 'c': wait=on is not supported; use wait=off"),
        (
            ("--chardev", "socket,id=c,path=p,reconnect=1"),
            "option 'reconnect' is not known; known are id, path, server, wait",
        ),
        (("--monitor", "c"), "chardev 'c' does not exist"),
        (("--pidfile", "absent/pid"), "write the pidfile on 'absent/pid': No such file or directory"),
        (("--pidfile", "."), "write the pidfile on '.': "),
    ],
)
def test_what_is_unknown_or_wrong_is_refused_by_name(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    assert message in fail("storage-daemon", *options, cwd=tmp_path)
    assert os.listdir(tmp_path) == ["a.raw"]


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    done = run("storage-daemon", "--daemonize")
    assert done.returncode == 2
    assert done.stderr == (
        "fleecer: option '--daemonize' is not known; known are --blockdev, --nbd-server, --export, --chardev, "
        "--monitor, --object, --pidfile; see fleecer storage-daemon --help\n"
    )
