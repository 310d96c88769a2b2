"""`demo`: the whole job, with its proof."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_world import ENVIRONMENT, PROGRAM, TIMEOUT_S

pytestmark = pytest.mark.peer


def test_the_demo_proves_its_point_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "demo"],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"The backup equals the snapshot, byte for byte", done.stdout)
    assert re.search(r"qemu-img check and qemu-img compare say the same", done.stdout)
    assert re.search(r"e2fsck -f -n: the file system in it is sound", done.stdout)
    written, later = re.search(
        r"(\d+) hold the last write before.* of (\d+) writes issued after", done.stdout, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert int(written) > 1000
    assert int(later) > 10_000
    assert re.search(r"^Proven in \d+ s; nothing is left behind\.$", done.stdout, re.MULTILINE)
    assert os.listdir(tmp_path) == []


def test_a_daemon_that_mixes_times_fails_the_demo(tmp_path: Path) -> None:
    """With reads of the past not held apart from writes, the proof must find it, or the comparison before it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import fleecer.block.copier as copier\ncopier.Copier.must_preserve = lambda self, offset, length: False\n"
    )
    (tmp_path / "tmp").mkdir()
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    done = subprocess.run(
        [*PROGRAM, "demo"],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("fleecer: ")
    assert "Proven" not in done.stdout
    assert os.listdir(tmp_path / "tmp") == []


def test_without_e2fsprogs_one_line_tells_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys, fleecer.cli.program, fleecer.cli.demo.disk as disk\n"
        "disk._TOOL_DIRECTORIES = '/nonexistent'\n"
        "sys.exit(fleecer.cli.program.run(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fleecer: the demo needs e2fsck, which is not installed: apt-get install e2fsprogs\n"


def test_ctrl_c_ends_the_demo_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "demo"],
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "snapshot create" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (130, "fleecer: interrupted\n")
    assert os.listdir(tmp_path) == []
