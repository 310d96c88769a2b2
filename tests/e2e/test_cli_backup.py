"""`backup` and `restore` with real daemons, judged by qemu-img."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleecer.cli.qmp_client import QmpClient
from fleecer.units import MiB
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


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_backups_are_sparse_standard_images_that_equal_the_disks(tmp_path: Path) -> None:
    peer("qemu-img", "create", "-q", "-f", "qcow2", "web.qcow2", "1T", cwd=tmp_path)
    peer(
        "qemu-io",
        "-c",
        "write -P 3 700G 5M",
        "-c",
        "write -z 0 10M",
        "-c",
        "write -P 4 5M 64k",
        "web.qcow2",
        cwd=tmp_path,
    )
    raw_image(tmp_path / "data.raw", 100_001, (50_000, b"data"))
    with Serving(tmp_path, "web.qcow2", "data.raw") as daemon:
        told = document("backup", "--to", str(tmp_path / "b"), "--run-dir", daemon.run_dir)
        assert [disk["name"] for disk in told["disks"]] == ["web", "data"]
        web, data = told["disks"]
        assert set(web) == {"name", "path", "kind", "bytes_read", "bytes_written", "seconds"}
        assert re.fullmatch(rf"{re.escape(str(tmp_path))}/b/web/\d{{8}}T\d{{6}}Z\.qcow2", web["path"])
        assert (web["kind"], web["bytes_read"], web["bytes_written"]) == ("full", 5 * MiB + 65536, 5 * MiB + 65536)
        assert document("snapshot", "list", "--run-dir", daemon.run_dir) == {"snapshots": []}
    for backup, image, kind in ((web, "web.qcow2", "qcow2"), (data, "data.raw", "raw")):
        peer("qemu-img", "check", "-q", backup["path"])
        peer("qemu-img", "compare", "-q", "-f", "qcow2", "-F", kind, backup["path"], str(tmp_path / image))
    assert os.stat(web["path"]).st_blocks * 512 < 8 * MiB
    assert len(files_below(tmp_path / "b")) == 2


@pytest.mark.parametrize("size", [100_001, 512 * 3 - 1])
def test_a_backup_of_an_odd_size_is_whole_for_qemu_and_restored_to_the_byte(tmp_path: Path, size: int) -> None:
    content = raw_image(tmp_path / "a.raw", size, (0, random.Random(2).randbytes(size)))
    with Serving(tmp_path, "a.raw") as daemon:
        (disk,) = document("backup", "--to", str(tmp_path / "b"), "--run-dir", daemon.run_dir)["disks"]
    peer("qemu-img", "check", "-q", disk["path"])
    peer("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", disk["path"], str(tmp_path / "a.raw"))
    peer("qemu-img", "convert", "-O", "raw", disk["path"], str(tmp_path / "theirs.raw"))
    assert (tmp_path / "theirs.raw").read_bytes() == content + bytes(-size % 512)
    peer("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", disk["path"])  # rewrites the header
    succeed("restore", disk["path"], str(tmp_path / "ours.raw"))
    assert (tmp_path / "ours.raw").read_bytes() == content


def test_a_backup_made_while_a_writer_goes_on_equals_a_snapshot_cut_before_it(tmp_path: Path) -> None:
    """The writer's blocks all say the same number, which only grows: a mixture would show two."""
    raw_image(tmp_path / "a.raw", 4 * MiB)
    with Serving(tmp_path, "a.raw") as daemon:
        write(daemon.uris["a"], "write -P 1 0 4M")
        stop = threading.Event()

        def overwrite() -> None:
            pattern = 2
            while not stop.is_set():
                write(daemon.uris["a"], f"write -P {pattern} 0 4M")
                pattern = pattern % 250 + 1

        writer = threading.Thread(target=overwrite)
        writer.start()
        try:
            told = document("backup", "--to", str(tmp_path / "b"), "--run-dir", daemon.run_dir)
        finally:
            stop.set()
            writer.join()
    succeed("restore", told["disks"][0]["path"], str(tmp_path / "restored.raw"))
    content = (tmp_path / "restored.raw").read_bytes()
    assert content == content[:1] * (4 * MiB)
    assert content[0] > 0


def test_two_backups_of_one_second_get_two_names(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    with Serving(tmp_path, "a.raw") as daemon, QmpClient(f"{daemon.run_dir}/qmp.sock"):
        for _ in range(3):
            succeed("backup", "a", "--to", str(tmp_path / "b"), "--run-dir", daemon.run_dir)
    assert len(files_below(tmp_path / "b")) == 3


def test_progress_goes_to_standard_error_and_the_result_to_standard_output(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB, (0, b"x" * 4096))
    with Serving(tmp_path, "a.raw") as daemon:
        done = run("backup", "--to", "b", "--run-dir", daemon.run_dir, cwd=tmp_path)
    assert (
        re.fullmatch(r"a: b/a/\S+Z\.qcow2 \(4\.0 KiB of 1\.0 MiB in \d+\.\d s\)\n", done.stdout)
        or "64.0 KiB" in done.stdout
    )
    assert done.stderr == "a: copying, 4.0 KiB of 4.0 KiB\n"


def test_on_a_terminal_a_bar_is_drawn(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", 4 * MiB, (0, os.urandom(3 * MiB)))
    with Serving(tmp_path, "a.raw") as daemon:
        master, terminal = os.openpty()
        process = subprocess.Popen(
            [*PROGRAM, "backup", "--to", "b", "--run-dir", daemon.run_dir],
            cwd=tmp_path,
            env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"},
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
        )
        os.close(terminal)
        drawn = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the terminal's last user has gone
                break
            if not piece:
                break
            drawn += piece
        os.close(master)
        out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert out.startswith("a: b/a/")
    assert b"a: copying" in drawn
    assert b"[##############################] 100% 3.0 MiB of 3.0 MiB" in drawn


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_backup_leaves_no_file_and_no_snapshot(tmp_path: Path, number: signal.Signals) -> None:
    raw_image(tmp_path / "a.raw", 64 * MiB)
    with (tmp_path / "a.raw").open("r+b") as image:
        image.write(random.Random(1).randbytes(64 * MiB))
    with slowly_served(tmp_path) as run_dir, QmpClient(f"{run_dir}/qmp.sock") as watching:
        process = subprocess.Popen(
            [*PROGRAM, "backup", "--to", str(tmp_path / "b"), "--run-dir", run_dir],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("a: copying, "), line + process.stderr.read()
        assert len(watching.execute("query-snapshots")) == 1
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
        if number == signal.SIGKILL:
            assert (process.returncode, out, err) == (-number, "", "")
        else:
            by = "" if number == signal.SIGINT else f" by {number.name}"
            assert (process.returncode, out, err) == (128 + number, "", f"fleecer: interrupted{by}\n")
            assert not (tmp_path / "b").exists()
        while watching.execute("query-snapshots"):
            pass
        assert files_below(tmp_path / "b") == []


class slowly_served:  # noqa: N801 - it is used as a function
    """A disk "a" that reads at 8 MiB/s, so that a backup takes a while; gives a run directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> str:
        run_dir = self.directory / "slow"
        run_dir.mkdir()
        self.process = subprocess.Popen(
            [
                *PROGRAM,
                "storage-daemon",
                *("--blockdev", f"driver=file,node-name=f,filename={self.directory}/a.raw"),
                *("--blockdev", "driver=throttle,node-name=a,file=f,bps-total=8388608"),
                *("--nbd-server", f"addr.type=unix,addr.path={run_dir}/nbd.sock"),
                *("--export", "nbd,id=a,node-name=a,writable=on"),
                *("--chardev", f"socket,id=m,path={run_dir}/qmp.sock,server=on,wait=off", "--monitor", "m"),
                *("--pidfile", f"{run_dir}/pid"),
            ],
            env=ENVIRONMENT,
        )
        while not (run_dir / "pid").exists():
            assert self.process.poll() is None
        return str(run_dir)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.wait(TIMEOUT_S) == 0


def test_kill_9_of_the_daemon_fails_the_backup_and_leaves_no_file(tmp_path: Path) -> None:
    assert interfered(tmp_path, lambda process, _: process.kill(), signal.SIGKILL) == (
        f"fleecer: the daemon at '{tmp_path}/slow/qmp.sock' ended while disk 'a' was copied; there is no backup of it\n"
    )


def test_the_end_of_the_daemon_in_order_is_told_by_the_backup(tmp_path: Path) -> None:
    assert "ended while disk 'a' was copied" in interfered(tmp_path, lambda process, _: process.terminate(), 0)


def test_a_snapshot_deleted_under_a_backup_is_told(tmp_path: Path) -> None:
    def delete(process: subprocess.Popen[bytes], qmp: QmpClient) -> None:
        qmp.execute("snapshot-delete", {"name": qmp.execute("query-snapshots")[0]["name"]})
        process.terminate()

    told = interfered(tmp_path, delete, 0)
    assert re.fullmatch(
        r"fleecer: (snapshot '\S+' was deleted|the daemon at '\S+' ended) while disk 'a' was copied; "
        r"there is no backup of it\n",
        told,
    )


def interfered(tmp_path: Path, act: Callable[[subprocess.Popen[bytes], QmpClient], None], status: int) -> str:
    """What a backup says when something is done to the daemon meanwhile, which ends with `status`; no file is left."""
    raw_image(tmp_path / "a.raw", 64 * MiB, (0, b"x" * (64 * MiB)))
    slow = slowly_served(tmp_path)
    run_dir = slow.__enter__()
    process = subprocess.Popen(
        [*PROGRAM, "backup", "--to", str(tmp_path / "b"), "--run-dir", run_dir],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("a: copying, ")
    with QmpClient(f"{run_dir}/qmp.sock") as qmp:
        act(slow.process, qmp)
        assert slow.process.wait(TIMEOUT_S) == -status
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()
    return err


def test_a_full_target_fails_the_backup_with_its_cause_and_no_snapshot_is_left(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", 4 * MiB, (0, os.urandom(4 * MiB)))
    with Serving(tmp_path, "a.raw") as daemon:
        command = f'ulimit -f 2048; exec "$@" backup --to b --run-dir {daemon.run_dir} --json'
        done = subprocess.run(
            ["bash", "-c", command, "bash", *PROGRAM],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"fleecer: write of \d+ bytes at \d+ on '\S+/\(new file\)': File too large\n", done.stderr)
        while document("snapshot", "list", "--run-dir", daemon.run_dir)["snapshots"]:
            pass
    assert files_below(tmp_path / "b") == []


def test_a_restored_image_is_told_of_in_full_and_goes_both_ways(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "a.raw", 3 * MiB + 777, (MiB, os.urandom(100_000)))
    told = document("restore", "a.raw", "b.qcow2", cwd=tmp_path)
    assert set(told) == {"target", "format", "size", "bytes_written", "verified", "seconds"}
    assert (told["target"], told["format"], told["size"], told["verified"]) == ("b.qcow2", "qcow2", len(content), True)
    peer("qemu-img", "check", "-q", "b.qcow2", cwd=tmp_path)
    out = succeed("restore", "b.qcow2", "c.raw", cwd=tmp_path)
    assert re.fullmatch(r"c\.raw: restored and verified \(raw, [\d.]+ KiB of 3\.0 MiB in \d+\.\d s\)\n", out)
    assert (tmp_path / "c.raw").read_bytes() == content


def test_a_target_that_exists_needs_force(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB, (0, b"new"))
    (tmp_path / "b.raw").write_bytes(b"old")
    assert fail("restore", "a.raw", "b.raw", cwd=tmp_path) == "target 'b.raw' exists; use --force to overwrite it"
    assert (tmp_path / "b.raw").read_bytes() == b"old"
    succeed("restore", "a.raw", "b.raw", "--force", cwd=tmp_path)
    assert (tmp_path / "b.raw").read_bytes() == (tmp_path / "a.raw").read_bytes()


def test_a_target_without_a_telling_ending_needs_its_format(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB, (0, b"new"))
    told = fail("restore", "a.raw", "b.bin", cwd=tmp_path)
    assert told.startswith("image 'b.bin': format not given, and its ending tells none; refusing to guess")
    succeed("restore", "a.raw", "b.bin", "--format", "qcow2", cwd=tmp_path)
    assert "file format: qcow2" in peer("qemu-img", "info", "b.bin", cwd=tmp_path)


@pytest.mark.root
def test_a_block_device_is_restored_in_place_with_force(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "a.raw", MiB, (4096, os.urandom(300_000)))
    raw_image(tmp_path / "device", 2 * MiB, (0, b"\xaa" * (2 * MiB)))
    device = peer("losetup", "--find", "--show", str(tmp_path / "device")).strip()
    try:
        told = fail("restore", "a.raw", device, "--format", "raw", cwd=tmp_path)
        assert told == f"target '{device}' exists; use --force to overwrite it"
        told = fail("restore", "a.raw", device, "--format", "qcow2", "--force", cwd=tmp_path)
        assert told == f"target '{device}' is a block device, and only --format raw can be written to one"
        succeed("restore", "a.raw", device, "--format", "raw", "--force", cwd=tmp_path)
        raw_image(tmp_path / "large.raw", 3 * MiB)
        told = fail("restore", "large.raw", device, "--format", "raw", "--force", cwd=tmp_path)
        assert told == f"target '{device}' has {2 * MiB} bytes, too few for the backup's {3 * MiB}"
    finally:
        peer("losetup", "--detach", device)
    assert (tmp_path / "device").read_bytes() == content + b"\xaa" * MiB
