"""What users do wrong, or find broken: one clear line each, and nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleecer.cli.qmp_client import QmpClient
from fleecer.units import MiB
from tests.cli_world import ENVIRONMENT, PROGRAM, Serving, document, fail, peer, raw_image, run, write

pytestmark = pytest.mark.peer


def refused(directory: Path, *images: str) -> str:
    """`serve` must refuse; returns its line. No socket may be left."""
    told = fail("serve", *images, "--run-dir", str(directory / "run"), cwd=directory)
    assert not (directory / "run" / "nbd.sock").exists()
    return told


def qcow2(directory: Path, name: str, *options: str) -> Path:
    peer("qemu-img", "create", "-q", "-f", "qcow2", *options, name, "16M", cwd=directory)
    return directory / name


def test_a_missing_image(tmp_path: Path) -> None:
    assert refused(tmp_path, "a.raw") == "image 'a.raw' does not exist"
    assert refused(tmp_path, "a.qcow2") == "image 'a.qcow2' does not exist"
    assert refused(tmp_path, "a", "--format", "raw") == "image 'a' does not exist"


def test_an_image_that_is_a_directory_or_a_fifo(tmp_path: Path) -> None:
    (tmp_path / "d.raw").mkdir()
    os.mkfifo(tmp_path / "f.raw")
    expected = "image '{}' is {}; only regular files and block devices will do"
    assert refused(tmp_path, "d.raw") == expected.format("d.raw", "a directory")
    assert refused(tmp_path, "f.raw") == expected.format("f.raw", "a FIFO")


def test_an_unreadable_image(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # nothing is unreadable for root, but what the file system itself refuses
        path = tmp_path / "a.raw"
        path.symlink_to("a.raw")
        assert refused(tmp_path, "a.raw") == "image 'a.raw' is a symbolic link that leads to itself"
    else:
        raw_image(tmp_path / "a.raw", MiB)
        (tmp_path / "a.raw").chmod(0)
        assert refused(tmp_path, "a.raw") == (
            "image 'a.raw' may not be opened by this user; see the modes of it and of the directories that lead to it"
        )


def test_a_format_that_nothing_tells_is_never_probed(tmp_path: Path) -> None:
    qcow2(tmp_path, "a.qcow2").rename(tmp_path / "disk")
    assert refused(tmp_path, "disk") == (
        "image 'disk': format not given, and its ending tells none; refusing to guess, because a guest can forge a "
        "header. Use --format raw or --format qcow2"
    )
    size = (tmp_path / "disk").stat().st_size
    with Serving(tmp_path, "disk", options=("--format", "raw")) as daemon:
        assert peer("nbdinfo", "--size", daemon.uris["disk"]) == f"{size}\n", "as raw it is its bytes"


def test_a_truncated_or_corrupt_qcow2(tmp_path: Path) -> None:
    image = qcow2(tmp_path, "a.qcow2").read_bytes()
    for name, content in (
        ("empty.qcow2", b""),
        ("short.qcow2", image[:50]),
        ("magic.qcow2", b"nope" + image[4:]),
        ("l1.qcow2", image[:36] + b"\xff\xff\xff\xff" + image[40:]),
        ("cut.qcow2", image[:65536]),
    ):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path, name).startswith(f"image '{name}': "), name
        assert (tmp_path / name).read_bytes() == content


def test_a_backing_file_that_is_absent_a_directory_or_a_fifo(tmp_path: Path) -> None:
    qcow2(tmp_path, "a.qcow2", "-u", "-b", "base.raw", "-F", "raw")
    base = tmp_path / "base.raw"
    assert refused(tmp_path, "a.qcow2") == f"image 'a.qcow2': its backing file '{base}' does not exist"
    base.mkdir()
    assert (
        refused(tmp_path, "a.qcow2") == f"image '{base}' is a directory; only regular files and block devices will do"
    )
    base.rmdir()
    os.mkfifo(base)
    assert refused(tmp_path, "a.qcow2") == f"image '{base}' is a FIFO; only regular files and block devices will do"


def test_a_backing_chain_that_is_a_loop(tmp_path: Path) -> None:
    qcow2(tmp_path, "a.qcow2", "-u", "-b", "b.qcow2", "-F", "qcow2")
    qcow2(tmp_path, "b.qcow2", "-u", "-b", "a.qcow2", "-F", "qcow2")
    told = refused(tmp_path, "a.qcow2")
    assert told == (
        f"image '{tmp_path}/b.qcow2': its backing file 'a.qcow2' is an image above it in the chain; that is a loop"
    )


def test_a_backing_file_outside_the_images_directory_needs_leave(tmp_path: Path) -> None:
    for name in ("images", "bases"):
        (tmp_path / name).mkdir()
    raw_image(tmp_path / "bases" / "base.raw", 16 * MiB, (0, b"base"))
    qcow2(tmp_path, "images/a.qcow2", "-u", "-b", f"{tmp_path}/bases/base.raw", "-F", "raw")
    assert refused(tmp_path, "images/a.qcow2") == (
        f"image 'images/a.qcow2': its backing file '{tmp_path}/bases/base.raw' is outside '{tmp_path}/images'; "
        f"--allow-backing '{tmp_path}/bases' would allow it"
    )
    with Serving(tmp_path, "images/a.qcow2", options=("--allow-backing", "bases")) as daemon:
        told = peer("qemu-io", "-r", "-f", "raw", "-c", "read -v 0 4", daemon.uris["a"])
        assert "base" in told


def test_an_image_that_another_process_holds(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    with Serving(tmp_path, "a.raw"):
        told = fail("serve", "a.raw", "--run-dir", str(tmp_path / "other"), cwd=tmp_path)
        assert told == "image 'a.raw': another process holds it for writing (lock); stop it first"
        theirs = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "read 0 512", "a.raw"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert theirs.returncode
        assert "lock" in theirs.stderr


def test_a_read_only_image_that_a_client_writes_to(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "a.raw", MiB, (0, b"kept"))
    with Serving(tmp_path, "a.raw", options=("--read-only",)) as daemon:
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-c", "write 0 512", daemon.uris["a"]], capture_output=True, text=True, check=False
        )
        assert done.returncode
        assert "Permission denied" in done.stderr
    assert (tmp_path / "a.raw").read_bytes() == content


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    peer("mount", "-t", "tmpfs", "-o", "size=1m", "fleecer-test", str(place))
    try:
        yield place
    finally:
        peer("umount", str(place))


@pytest.mark.root
def test_a_full_scratch_breaks_the_snapshot_with_its_cause_and_the_guest_goes_on(tmp_path: Path, small: Path) -> None:
    raw_image(tmp_path / "a.raw", 8 * MiB, (0, os.urandom(8 * MiB)))
    with Serving(tmp_path, "a.raw") as daemon:
        (uri,) = daemon.snapshot("--name", "s", "--scratch-dir", str(small))
        write(daemon.uris["a"], "write -P 7 0 8M")
        peer("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 8M", daemon.uris["a"])
        ((part,),) = (s["disks"] for s in document("snapshot", "list", "--run-dir", daemon.run_dir)["snapshots"])
        assert part["state"] == "broken"
        assert part["cause"].endswith("No space left on device; free space there, or keep it elsewhere (scratch-dir)")
        for command in (("snapshot", "list"), ("status",)):
            assert f"broken: {part['cause']}" in run(*command, "--run-dir", daemon.run_dir).stdout
        copied = subprocess.run(["nbdcopy", uri, str(tmp_path / "copy")], capture_output=True, text=True, check=False)
        assert copied.returncode, "a broken snapshot gives errors, not data"
        assert not os.listdir(small)
        _, err = daemon.stop()
        assert "snapshot a@s is broken: " in err


def test_two_disks_of_one_name_and_names_unfit(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    assert refused(tmp_path, "a.raw", "b=./a.raw") == (
        "images 'a.raw' and './a.raw' are the same file; serve it once, or all with --read-only"
    )
    assert refused(tmp_path, "a.raw", "a.raw") == (
        "images 'a.raw' and 'a.raw' are both named 'a'; name one otherwise: NAME=IMAGE"
    )
    for name in ("a@b", ".."):
        assert refused(tmp_path, f"{name}=a.raw") == (
            f"disk name '{name}' must not be empty, nor have '/' or '@' or control characters in it; "
            "name the disk: NAME=IMAGE"
        )
    long = "n" * 129
    assert refused(tmp_path, f"{long}=a.raw") == f"disk name '{long}' is longer than 128 bytes; choose a shorter one"


def test_a_bad_address_to_listen_at(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    told = fail("serve", "a.raw", "--listen", "localhost:99999", "--run-dir", "run", cwd=tmp_path)
    assert told == "address 'localhost:99999': port '99999' is not a number up to 65535, as in 127.0.0.1:10809"
    told = fail("serve", "a.raw", "--listen", ":0", "--run-dir", "run", cwd=tmp_path)
    assert told == "address ':0' names no host; 0.0.0.0 or [::] is every address"
    told = fail("serve", "a.raw", "--listen", "::1", "--run-dir", "run", cwd=tmp_path)
    assert told == "address '::1' is not HOST:PORT; an IPv6 address goes in brackets, as in [::1]:10809"


def test_a_run_directory_in_use(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    raw_image(tmp_path / "b.raw", MiB)
    with Serving(tmp_path, "a.raw") as daemon:
        told = fail("serve", "b.raw", "--run-dir", daemon.run_dir, cwd=tmp_path)
        assert (
            told == f"run directory '{daemon.run_dir}' is in use by process {daemon.process.pid}; stop that, or "
            "choose another with --run-dir"
        )
        with QmpClient(f"{daemon.run_dir}/qmp.sock") as client:
            assert [disk["name"] for disk in client.execute("query-disks")] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("snapshot", "create", "--cbw-timeout", "-1"),
            "Invalid value for '--cbw-timeout': '-1' is not a number of seconds from 0 to 86400",
        ),
        (
            ("snapshot", "create", "--cbw-timeout", "nan"),
            "Invalid value for '--cbw-timeout': 'nan' is not a number of seconds from 0 to 86400",
        ),
        (("status", "--run-dir", ""), "Invalid value for '--run-dir': it is empty; name a path"),
        (("backup", "--to", ""), "Invalid value for '--to': it is empty; name a path"),
        (("serve", ""), "Invalid value for '[NAME=]IMAGE...': it is empty; name a path"),
    ],
)
def test_values_that_no_option_takes_are_told_with_their_limits(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"fleecer: {message}; see fleecer ")


def test_a_run_directory_that_is_none_or_has_a_long_name_is_told_by_every_command(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    long = str(tmp_path / ("x" * 120))
    for command in (("status",), ("snapshot", "list"), ("backup", "--to", str(tmp_path / "b"))):
        told = fail(*command, "--run-dir", str(tmp_path / "file"))
        assert told == f"run directory '{tmp_path}/file': it, or a part of its path, is no directory; name a daemon's"
        told = fail(*command, "--run-dir", long)
        assert told.endswith("more than the 107 that the system takes; choose a shorter one")
    assert os.listdir(tmp_path) == ["file"]


def test_output_that_cannot_be_written_is_told_and_leaves_no_snapshot(tmp_path: Path) -> None:
    raw_image(tmp_path / "a.raw", MiB)
    with Serving(tmp_path, "a.raw") as daemon, QmpClient(f"{daemon.run_dir}/qmp.sock") as watching:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*PROGRAM, "snapshot", "create", "--run-dir", daemon.run_dir],
                env=ENVIRONMENT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert (done.returncode, done.stderr) == (1, "fleecer: standard output: No space left on device\n")
        while watching.execute("query-snapshots"):
            pass


def test_a_path_that_is_not_utf_8_is_served_and_shown_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.raw"
    with open(path, "wb") as file:
        file.truncate(MiB)
    with Serving(tmp_path, f"a={os.fsdecode(path)}") as daemon:
        assert f"{tmp_path}/\\xff.raw" in run("status", "--run-dir", daemon.run_dir).stdout


def test_a_backup_is_not_restored_over_itself(tmp_path: Path) -> None:
    content = raw_image(tmp_path / "a.raw", MiB, (0, b"kept"))
    (tmp_path / "link.raw").symlink_to("a.raw")
    assert fail("restore", "--force", "a.raw", "link.raw", cwd=tmp_path) == (
        "target 'link.raw' is the backup itself; choose another"
    )
    assert (tmp_path / "a.raw").read_bytes() == content
