"""`serve`, `status` and `snapshot` with real daemons and foreign clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleecer.cli.qmp_client import QmpClient
from fleecer.units import KiB, MiB
from tests.cli_world import (
    ENVIRONMENT,
    PROGRAM,
    TIMEOUT_S,
    Serving,
    document,
    fail,
    peer,
    raw_image,
    run,
    succeed,
    write,
)

pytestmark = pytest.mark.peer


def test_two_disks_are_served_to_foreign_clients_locally_and_over_tcp(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "data.raw", 4 * MiB, (MiB, os.urandom(MiB)))
    peer("qemu-img", "create", "-q", "-f", "qcow2", "web.qcow2", "64M", cwd=tmp_path)
    with Serving(tmp_path, "web.qcow2", "data=data.raw", options=("--listen", "127.0.0.1:0")) as daemon:
        assert daemon.uris["web"] == f"nbd+unix:///web?socket={tmp_path}/run/nbd.sock"
        tcp = daemon.lines[1].split()[2]
        assert tcp.startswith("nbd://127.0.0.1:")
        assert tcp.endswith("/data")
        write(daemon.uris["web"], "write -P 7 1M 2M", "flush")
        peer("nbdcopy", tcp, str(tmp_path / "copy.raw"))
        assert (tmp_path / "copy.raw").read_bytes() == content
        listed = json.loads(peer("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={tmp_path}/run/nbd.sock"))
        assert [export["export-name"] for export in listed["exports"]] == ["web", "data"]
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "run" / "nbd.sock").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "run" / "qmp.sock").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path / "run")) == ["daemon.lock"]
    peer("qemu-img", "check", "-q", str(tmp_path / "web.qcow2"))
    peer("qemu-io", "-r", "-c", "read -P 7 1M 2M", str(tmp_path / "web.qcow2"))


@pytest.mark.parametrize("size", [1, 511, 100_001])
def test_a_size_that_is_no_multiple_of_512_is_served_whole(tmp_path: Path, size: int) -> None:
    content = raw_image(tmp_path / "odd.raw", size, (0, os.urandom(size)))
    with Serving(tmp_path, "odd.raw") as daemon:
        assert peer("nbdinfo", "--size", daemon.uris["odd"]) == f"{size}\n"
        peer("nbdcopy", daemon.uris["odd"], str(tmp_path / "copy.raw"))
        (snapshot,) = daemon.snapshot()
        peer("nbdcopy", snapshot, str(tmp_path / "snapshot.raw"))
    assert (tmp_path / "copy.raw").read_bytes() == content
    assert (tmp_path / "snapshot.raw").read_bytes() == content


def test_status_shows_disks_clients_and_snapshots(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    with Serving(tmp_path, "a.raw") as daemon:
        assert document("status", "--run-dir", daemon.run_dir) == {
            "disks": [
                {"name": "a", "size": MiB, "format": "raw", "uri": daemon.uris["a"], "uris": [daemon.uris["a"]]}
                | {"snapshots": []}
            ]
        }
        taken = document("snapshot", "create", "--run-dir", daemon.run_dir, "--name", "s")
        (disk,) = document("status", "--run-dir", daemon.run_dir)["disks"]
        assert disk["snapshots"] == [
            {
                "name": "s",
                "created": taken["created"],
                "uri": taken["disks"][0]["uri"],
                "uris": [taken["disks"][0]["uri"]],
                "bytes_preserved": 0,
                "state": "active",
            }
        ]
        lines = succeed("status", "--run-dir", daemon.run_dir).splitlines()
        assert lines[0].split() == ["DISK", "SIZE", "FORMAT", "CLIENTS", "READ", "WRITTEN", "IMAGE"]
        assert lines[1].split() == ["a", "1.0", "MiB", "raw", "0", "0", "B/s", "0", "B/s", str(tmp_path / "a.raw")]
        assert lines[3].split() == ["SNAPSHOT", "DISK", "AGE", "PRESERVED", "CLIENTS", "STATE"]
        assert lines[4].split()[:2] == ["s", "a"]
        assert [line.split() for line in lines[6:]] == [
            ["EXPORT", "URI"],
            ["a", daemon.uris["a"]],
            ["a@s", taken["disks"][0]["uri"]],
        ]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_over_tcp_snapshots_and_disks_have_a_second_uri(tmp_path: Path, host: str) -> None:
    content = raw_image(tmp_path / "a.raw", MiB, (0, b"past"))
    with Serving(tmp_path, "a.raw", options=("--listen", f"{host}:0")) as daemon:
        local, remote = daemon.snapshot("--name", "s")
        write(daemon.uris["a"], "write -P 1 0 64k")
        assert local == f"nbd+unix:///a@s?socket={daemon.run_dir}/nbd.sock"
        shown = socket.gethostname() if host == "0.0.0.0" else host
        assert remote.startswith(f"nbd://{shown}:")
        peer("nbdcopy", remote.replace(f"//{shown}:", "//127.0.0.1:"), str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == content
        (disk,) = document("status", "--run-dir", daemon.run_dir)["disks"]
        assert disk["uris"] == daemon.lines[0].split()[1:]
        assert (disk["uri"], disk["snapshots"][0]["uris"]) == (disk["uris"][0], [local, remote])


def test_a_reader_of_the_first_line_only_has_its_snapshot(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    with Serving(tmp_path, "a.raw", options=("--listen", "127.0.0.1:0")) as daemon:
        for number in range(3):
            command = f'"$@" snapshot create --name s{number} --run-dir {daemon.run_dir} | head -n 1'
            exported = f"set -o pipefail; export PYTHONPATH={ENVIRONMENT['PYTHONPATH']}"
            uri = peer("bash", "-c", f"{exported}; {command}", "-", *PROGRAM)
            assert peer("nbdinfo", "--size", uri.strip()) == f"{MiB}\n"


def test_a_snapshot_of_which_nobody_was_told_goes_again(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    script = (
        "import os, signal, sys\n"
        "from fleecer.cli import main, qmp_client\n"
        "real = qmp_client.QmpClient.execute\n"
        "def execute(self, command, *given, **more):\n"
        "    answer = real(self, command, *given, **more)\n"
        "    if command == 'snapshot-create': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return answer\n"
        "qmp_client.QmpClient.execute = execute\n"
        "main()\n"
    )
    with Serving(tmp_path, "a.raw") as daemon, QmpClient(f"{daemon.run_dir}/qmp.sock") as watching:
        done = subprocess.run(
            [sys.executable, "-c", script, "snapshot", "create", "--run-dir", daemon.run_dir],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "fleecer: interrupted\n")
        while watching.execute("query-snapshots"):
            pass
        daemon.snapshot("--name", "kept")
        assert [taken["name"] for taken in watching.execute("query-snapshots")] == ["kept"]


def test_a_snapshot_reads_as_the_disks_were_while_they_are_overwritten(tmp_path: Path) -> None:
    contents = {name: raw_image(tmp_path / f"{name}.raw", 2 * MiB, (0, os.urandom(MiB))) for name in "ab"}
    with Serving(tmp_path, "a.raw", "b.raw") as daemon:
        taken = document("snapshot", "create", "--run-dir", daemon.run_dir)
        assert [disk["name"] for disk in taken["disks"]] == ["a", "b"]
        assert [disk["size"] for disk in taken["disks"]] == [2 * MiB, 2 * MiB]
        for name in "ab":
            write(daemon.uris[name], "write -P 1 0 2M", "discard 0 1M")
        for disk in taken["disks"]:
            assert disk["uri"] == f"nbd+unix:///{disk['name']}@{taken['name']}?socket={daemon.run_dir}/nbd.sock"
            copy = tmp_path / f"{disk['name']}.copy"
            peer("nbdcopy", disk["uri"], str(copy))
            assert copy.read_bytes() == contents[disk["name"]]
        assert sorted(os.listdir(tmp_path)) == ["a.copy", "a.raw", "b.copy", "b.raw", "run"], "scratch has no name"
        listed = document("snapshot", "list", "--run-dir", daemon.run_dir)["snapshots"]
        assert [part["bytes_preserved"] for part in listed[0]["disks"]] == [2 * MiB, 2 * MiB]
        table = succeed("snapshot", "list", "--run-dir", daemon.run_dir).splitlines()
        assert table[0].split() == ["NAME", "DISK", "AGE", "PRESERVED", "STATE"]
        assert table[1].split()[:2] == [taken["name"], "a"]
        assert table[1].split()[-3:] == ["2.0", "MiB", "active"]
        assert document("snapshot", "delete", taken["name"], "--run-dir", daemon.run_dir) == {
            "deleted": [taken["name"]]
        }
        assert document("snapshot", "list", "--run-dir", daemon.run_dir) == {"snapshots": []}


def test_a_snapshot_may_be_of_some_disks_named_and_kept_elsewhere(tmp_path: Path) -> None:
    for name in "ab":
        raw_image(tmp_path / f"{name}.raw", MiB)
    (tmp_path / "scratch").mkdir()
    with Serving(tmp_path, "a.raw", "b.raw") as daemon:
        uris = daemon.snapshot("b", "--name", "before", "--scratch-dir", str(tmp_path / "scratch"))
        assert uris == [f"nbd+unix:///b@before?socket={daemon.run_dir}/nbd.sock"]
        write(daemon.uris["b"], "write -P 1 0 64k")
        peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uris[0])
        options = ("--run-dir", daemon.run_dir)
        assert fail("snapshot", "create", "c", *options) == "disk 'c' does not exist"
        told = fail("snapshot", "create", "--name", "before", *options)
        assert told == "snapshot name 'before' is taken; delete that one or choose another"
        assert fail("snapshot", "delete", "before", "nothing", *options) == "snapshot 'nothing' does not exist"
        listed = document("snapshot", "list", *options)["snapshots"]
        assert [snapshot["name"] for snapshot in listed] == ["before"], "all are deleted, or none"
        told = fail("snapshot", "create", "--scratch-dir", str(tmp_path / "absent"), *options)
        assert told == f"create a scratch file on '{tmp_path / 'absent'}': No such file or directory"


def test_uris_are_encoded_so_that_clients_understand_them(tmp_path: Path) -> None:
    (tmp_path / "a dir&x=1+2%").mkdir()
    raw_image(tmp_path / "a dir&x=1+2%" / "a.raw", 5 * KiB)
    with Serving(tmp_path / "a dir&x=1+2%", "dísk+?#%41=a.raw") as daemon:
        (uri,) = daemon.uris.values()
        assert "%20dir%26x%3D1%2B2%25/run/nbd.sock" in uri
        assert peer("nbdinfo", "--size", uri) == f"{5 * KiB}\n"
        (snapshot,) = daemon.snapshot("--name", "s+1")
        assert peer("nbdinfo", "--size", snapshot) == f"{5 * KiB}\n"
        listed = json.loads(peer("nbdinfo", "--json", snapshot))["exports"]
        assert [export["export-name"] for export in listed] == ["dísk+?#%41@s+1"]


def test_a_daemon_has_scratches_ready_that_no_directory_shows(tmp_path: Path) -> None:
    for name in ("one.raw", "two.raw"):
        raw_image(tmp_path / name, MiB)
    with Serving(tmp_path, "one.raw", "two.raw") as daemon:
        descriptors = Path(f"/proc/{daemon.process.pid}/fd")
        deadline_s = time.monotonic() + TIMEOUT_S
        while sum(os.readlink(one).endswith("(deleted)") for one in descriptors.iterdir()) < 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert sorted(os.listdir(tmp_path)) == ["one.raw", "run", "two.raw"]


def test_one_disk_is_the_default_export(tmp_path: Path) -> None:
    raw_image(tmp_path / "only.raw", 5 * KiB)
    with Serving(tmp_path, "only.raw") as daemon:
        assert peer("nbdinfo", "--size", f"nbd+unix:///?socket={daemon.run_dir}/nbd.sock") == f"{5 * KiB}\n"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "SIGHUP", "quit", "many"])
def test_the_orderly_end_is_status_zero_and_everything_is_in_the_image(tmp_path: Path, how: str) -> None:
    peer("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "64M", cwd=tmp_path)
    with Serving(tmp_path, "a.qcow2") as daemon:
        daemon.snapshot()
        write(daemon.uris["a"], "write -P 5 0 3M")
        if how == "quit":
            with QmpClient(f"{daemon.run_dir}/qmp.sock") as client:
                assert client.execute("quit") == {}
            _, err = daemon.process.communicate(timeout=TIMEOUT_S)
            assert (daemon.process.returncode, err) == (0, "")
        elif how == "many":
            for _ in range(5):
                daemon.process.send_signal(signal.SIGINT)
            assert daemon.stop() == (0, "")
        else:
            assert daemon.stop(signal.Signals[how]) == (0, "")
    peer("qemu-img", "check", "-q", str(tmp_path / "a.qcow2"))
    peer("qemu-io", "-r", "-c", "read -P 5 0 3M", str(tmp_path / "a.qcow2"))
    assert sorted(os.listdir(tmp_path / "run")) == ["daemon.lock"]


def test_kill_9_loses_nothing_that_a_flush_acknowledged_and_leaves_no_scratch(tmp_path: Path) -> None:
    peer("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "64M", cwd=tmp_path)
    with Serving(tmp_path, "a.qcow2") as daemon:
        daemon.snapshot()
        write(daemon.uris["a"], "write -P 5 0 3M", "flush")
        assert daemon.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2", "run"]
    told = json.loads(
        subprocess.run(
            ["qemu-img", "check", "--output=json", str(tmp_path / "a.qcow2")], capture_output=True, check=False
        ).stdout
    )
    assert not told.get("corruptions")
    assert not told["check-errors"]
    with Serving(tmp_path, "a.qcow2") as daemon:  # over the sockets that were left
        peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 5 0 3M", daemon.uris["a"])
        assert document("snapshot", "list", "--run-dir", daemon.run_dir) == {"snapshots": []}


def test_a_second_signal_gives_up_at_once(tmp_path: Path) -> None:
    # A read that takes long holds up the orderly end, so that there is time for a second signal.
    raw_image(tmp_path / "a.raw", 8 * MiB)
    process = subprocess.Popen(
        [
            *PROGRAM,
            "storage-daemon",
            *("--blockdev", "driver=file,node-name=f,filename=a.raw"),
            *("--blockdev", "driver=delay,node-name=d,file=f,read-s=50"),
            *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
            *("--export", "nbd,id=d,node-name=d"),
            *("--chardev", "socket,id=m,path=q.sock,server=on", "--monitor", "m"),
            *("--pidfile", "pid"),
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "pid").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
    reader = subprocess.Popen(
        ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", f"nbd+unix:///d?socket={tmp_path}/nbd.sock"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with QmpClient(f"{tmp_path}/q.sock") as client:
            while not client.execute("query-disks")[0]["reads"]:
                assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        while (tmp_path / "nbd.sock").exists():
            assert time.monotonic() < deadline
        assert process.poll() is None, "a read is in flight"
        while process.poll() is None:  # those of the first second are taken for one
            process.send_signal(signal.SIGTERM)
            assert time.monotonic() < deadline
        assert process.communicate(timeout=TIMEOUT_S)[1] == "fleecer: stopped again: giving up at once\n"
        assert process.returncode == 1
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.kill()
        reader.wait()


def test_a_daemon_that_is_not_there_is_told_of_with_what_to_do(tmp_path: Path) -> None:
    expected = f"there is no daemon at '{tmp_path}/qmp.sock'; start one with: fleecer serve [NAME=]IMAGE..."
    options = ("--run-dir", str(tmp_path))
    assert fail("status", *options) == expected
    assert fail("snapshot", "create", *options) == expected
    assert fail("backup", "--to", str(tmp_path / "b"), *options) == expected
    assert not (tmp_path / "b").exists()


def test_status_works_on_a_qemu_and_what_it_lacks_is_told(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    process = subprocess.Popen(
        [
            "qemu-storage-daemon",
            *("--blockdev", f"driver=file,node-name=a,filename={tmp_path}/a.raw"),
            *("--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd.sock"),
            *("--export", "type=nbd,id=web,node-name=a"),
            *("--chardev", f"socket,id=m,path={tmp_path}/q.sock,server=on,wait=off", "--monitor", "chardev=m"),
            *("--pidfile", f"{tmp_path}/pid"),
        ]
    )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
        qmp = ("--qmp", f"{tmp_path}/q.sock")
        assert document("status", *qmp) == {
            "disks": [{"name": "web", "size": MiB, "format": "file", "uri": None, "uris": [], "snapshots": []}]
        }
        told = fail("snapshot", "create", *qmp)
        assert told == f"the QMP server at '{tmp_path}/q.sock' is not Fleecer's, and has no way to take a snapshot"
        assert run("status", *qmp).stdout.splitlines()[1].split() == ["web", "1.0", "MiB", "file"]
    finally:
        process.terminate()
        process.wait()
