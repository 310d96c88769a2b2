"""The bench doubts its own runs: what it checks, what the kernel tells it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import process, runner, subjects
from bench.cells import Cell
from bench.figures import BenchError, Figures, Measure
from bench.images import Images
from bench.process import Client, parse_cpu_s, parse_field
from bench.report import CellResult
from bench.runner import Plan
from bench.snapshot_works import check_preserved, stalled_reader
from bench.subjects import Subject
from bench.works import Settings, Stand

WHOLE = 64 * 65536
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("kept", [[0, WHOLE, WHOLE], [200_000, WHOLE + 900_000, WHOLE + 1_000_000]])
def test_touches_that_preserved_each_cluster_once_are_believed(kept: list[int]) -> None:
    check_preserved(kept, WHOLE)


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ([0, WHOLE // 2, WHOLE // 2], "first touches preserved"),
        ([0, 3 * WHOLE, 3 * WHOLE], "first touches preserved"),
        ([0, WHOLE, 2 * WHOLE], "second touches preserved"),
    ],
)
def test_touches_that_preserved_too_little_or_too_much_are_not(kept: list[int], problem: str) -> None:
    with pytest.raises(BenchError, match=problem):
        check_preserved(kept, WHOLE)


def test_processor_time_is_read_whatever_the_program_is_called() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 {3 * ticks} {2 * ticks} 0 0 20 0"
    assert parse_cpu_s(stat) == 5.0


def test_what_the_kernel_does_not_tell_is_said() -> None:
    assert parse_field("rchar: 5\nread_bytes: 4096\n", "read_bytes") == 4096
    with pytest.raises(BenchError, match="VmRSS"):
        parse_field("Name:\tx\n", "VmRSS")


def test_a_client_that_fails_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="status 3: gone wrong"):
        process.call(["/bin/sh", "-c", "echo first; echo gone wrong >&2; exit 3"], str(tmp_path))


def test_long_output_is_kept_whole(tmp_path: Path) -> None:
    assert len(process.call(["/usr/bin/seq", "400000"], str(tmp_path)).splitlines()) == 400_000


def test_who_waits_for_a_client_hears_of_its_end_at_once_not_in_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError(f"slept {seconds} s, which rounds the time up")

    client = Client(["/bin/sleep", "0.2"], str(tmp_path))
    monkeypatch.setattr(time, "sleep", sleep)
    try:
        assert client.finish(60.0) == ""
    finally:
        client.end()


def test_a_client_that_takes_too_long_is_told(tmp_path: Path) -> None:
    client = Client(["/bin/sleep", "600"], str(tmp_path))
    try:
        with pytest.raises(BenchError, match="sleep did not end within 0 s"):
            client.finish(0.1)
    finally:
        client.end()


def test_the_end_of_a_client_is_the_end_of_what_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = ["/bin/sh", "-c", 'sleep 600 & echo $! >"$0.part"; mv "$0.part" "$0"; wait', str(child)]
    client = Client(command, str(tmp_path))
    while not child.exists():
        assert client.running()
    client.end()
    with pytest.raises(ProcessLookupError):
        wait_gone(int(child.read_text()))
    client.end()


def wait_gone(pid: int) -> None:
    """Raises ProcessLookupError as soon as there is no such process that still runs."""
    while True:
        os.kill(pid, 0)
        with contextlib.suppress(FileNotFoundError):
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                raise ProcessLookupError(pid)


def test_the_order_of_subjects_moves_on_with_each_round() -> None:
    three = [Subject(name, "qsd", ()) for name in ("a", "b", "c")]
    orders = ["".join(subject.name for subject in runner.turns(three, number)) for number in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


class Flaky:
    """Fails in its second run."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, stand: Stand, subject: Subject) -> Figures:
        self.runs += 1
        if self.runs == 2:
            raise BenchError("it did not\nwork")
        return {"rate": float(self.runs)}


def test_a_run_that_fails_is_written_down_and_the_rest_goes_on(tmp_path: Path) -> None:
    cell = Cell("x/raw/disk", "disk", Flaky(), ("fleecer",), (Measure("rate", "/s"),))
    settings = Settings(0.2, 1 << 20, 1)
    plan = Plan(
        [cell], [Subject("fleecer", "fleecer", ())], 3, settings, {"disk": str(tmp_path)}, str(tmp_path / "out")
    )
    (result,) = runner.run(plan, {"date": "2030-01-01"}, lambda _: None)
    assert [None if run is None else run["rate"] for run in result.samples["fleecer"]] == [1.0, None, 3.0]
    assert result.failures == ["fleecer, round 2: it did not work"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]["failures"] == result.failures
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_results_replace_those_of_the_cell_before(tmp_path: Path) -> None:
    for number in (1, 2):
        results = [CellResult(str(index), (), {}, []) for index in range(number)]
        runner.save(str(tmp_path), results, {})
        assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chart.svg", "results.json", "table.md"]


def test_a_version_is_found_in_what_a_program_says() -> None:
    assert subjects.version_in("qemu-storage-daemon version 10.0.13 (Debian 1:10.0)") == "10.0.13"
    with pytest.raises(BenchError, match="no version"):
        subjects.version_in("hello")


def test_commas_in_paths_do_not_end_a_daemons_option() -> None:
    assert subjects.escaped("/a,b") == "/a,,b"


def test_a_reader_does_not_stall_on_what_speaks_no_nbd(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as filler:
            filler.connect(path)
            accepted, _ = listener.accept()
            accepted.close()
    with pytest.raises(BenchError, match="could not begin"), stalled_reader(path, "x", 1 << 20):
        pass


@pytest.mark.peer
def test_a_snapshot_cell_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = bench(tmp_path, "--only", "snapshot-writes-depth-16/raw/disk")
    assert done.returncode == 0, done.stderr
    cell = json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]
    assert all(run and run["first touch"] > 0 for runs in cell["samples"].values() for run in runs)
    assert cell["failures"] == []
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.peer
def test_warm_reads_of_every_subject_stay_off_the_storage(tmp_path: Path) -> None:
    done = bench(tmp_path, "--only", "randread-4k-depth-16/raw/disk")
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]["samples"]
    assert {name.split()[0] for name in samples} == {"fleecer", "qsd", "nbdkit", "floor"}


def bench(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    images = directory / "images"
    images.mkdir()
    command = [sys.executable, "-m", "bench", "--rounds", "1", "--run-s", "0.2", "--image-size", "16M"]
    command += ["--dir", str(images), "--out", str(directory / "out"), "--qsd", "qemu-storage-daemon", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.peer
def test_a_run_that_is_told_to_stop_ends_in_order(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    command = ["/bin/sh", "-c", "trap '' INT; exec \"$@\"", "sh"]  # as behind a shell's &
    command += [sys.executable, "-m", "bench", "--rounds", "1000", "--image-size", "16M"]
    command += ["--only", "randread-*/raw/disk"]
    command += ["--dir", str(images), "--out", str(tmp_path / "out"), "--qsd", "qemu-storage-daemon"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
        while not list(images.glob("*/*full.raw")):
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        _, told = running.communicate(timeout=60)
    assert "interrupted" in told
    assert running.returncode == 1
    assert list(images.iterdir()) == []


def test_images_go_with_their_place(tmp_path: Path) -> None:
    images = Images(str(tmp_path), 1 << 20)
    with images.disk("raw") as disk:
        assert b"\0" not in Path(disk.path).read_bytes()
        assert Path(disk.path).stat().st_size == 1 << 20
    images.close()
    assert list(tmp_path.iterdir()) == []
