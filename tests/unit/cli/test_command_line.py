"""The command line as such: help, usage errors, output."""

from __future__ import annotations

import datetime
import subprocess
import sys

import pytest

from fleecer import __version__
from fleecer.cli import output, program
from fleecer.cli.progress import Meter, describe, draw
from fleecer.jobs.transfer import Progress
from fleecer.units import MiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command; see fleecer --help"),
        (["nonsense"], "No such command 'nonsense'; see fleecer --help"),
        (["serve"], "Missing argument '[NAME=]IMAGE...'; see fleecer serve --help"),
        (["backup"], "Missing option '--to'; see fleecer backup --help"),
        (["snapshot"], "Missing command; see fleecer snapshot --help"),
        (["status", "--foo"], "No such option '--foo'; see fleecer status --help"),
        (
            ["status", "--run-dir", "a", "--qmp", "b"],
            "--run-dir and --qmp exclude each other; see fleecer status --help",
        ),
        (["storage-daemon", "--blockdev"], "option --blockdev needs a value; see fleecer storage-daemon --help"),
        (
            ["storage-daemon", "--blockdev", "\udcff"],
            "option --blockdev '\\udcff' is not UTF-8, as QMP wants; rename it; see fleecer storage-daemon --help",
        ),
    ],
)
def test_a_wrong_command_line_is_status_two_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run(arguments) == 2
    assert capsys.readouterr() == ("", f"fleecer: {message}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "--help"] for name in ("serve", "snapshot", "backup", "restore", "status", "demo"))],
)
def test_help_is_there_for_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: fleecer")
    assert not err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run(["--version"]) == 0
    assert capsys.readouterr().out == f"fleecer {__version__}\n"


def test_help_imports_nothing_that_is_slow() -> None:
    script = (
        "import sys, fleecer.cli.program\n"
        "assert fleecer.cli.program.run(['--help']) == 0\n"
        "print(sorted({'asyncio', 'rich', 'uvloop', 'fleecer.daemon'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_output_to_a_reader_that_has_gone_is_status_one_without_a_word() -> None:
    script = "import fleecer.cli.program, sys; sys.exit(fleecer.cli.program.run(['serve', '--help']))"
    reader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    reader.stdout.close()
    assert reader.stderr is not None
    with reader.stderr:
        assert reader.stderr.read() == ""
    assert reader.wait() == 1


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3725, "1 h 2 min"), (86400, "1 d"), (90061, "1 d 1 h"), (-5, "0 s")],
)
def test_ages_are_told_in_two_units(seconds: int, told: str) -> None:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert output.age((now - datetime.timedelta(seconds=seconds)).isoformat(), now) == told


def test_without_a_terminal_progress_is_a_line_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter() as meter:
        meter.show("web", "copying", Progress(data=4096, read=1024))
        meter.show("web", "copying", Progress(data=4096, read=2048))
        meter.show("web", "verifying", Progress(data=4096, read=4096))
    expected = "web: copying, 1.0 KiB of 4.0 KiB\nweb: verifying, 4.0 KiB of 4.0 KiB\n"
    assert capsys.readouterr() == ("", expected)


def test_a_silent_meter_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(silent=True) as meter:
        meter.show("web", "copying", Progress(data=1))
    assert capsys.readouterr() == ("", "")


def test_elsewhere_than_on_a_terminal_lines_come_now_and_then_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Meter() as meter:
        for second in range(25):
            clock[0] = float(second)
            meter.show("web", "copying", Progress(data=100 * MiB, read=second * MiB))
    assert capsys.readouterr().err.splitlines() == [
        "web: copying, 0 B of 100 MiB",
        "web: copying, 10.0 MiB of 100 MiB, 1.0 MiB/s, 1 min 31 s left",
        "web: copying, 20.0 MiB of 100 MiB, 1.0 MiB/s, 1 min 21 s left",
    ]


@pytest.mark.parametrize("columns", [1, 20, 40, 60, 80, 200])
def test_a_drawn_line_never_wraps(columns: int) -> None:
    amount = Progress(data=3 * MiB, read=MiB)
    line = draw("web: copying", amount, describe(amount, 2.0), columns)
    assert len(line) <= max(columns - 1, 1)
    assert ("[" in line) == (columns >= 80)
    assert line == "web: copying"[: len(line)] or line.startswith("web: copying ")


@pytest.mark.parametrize("command", [["--help"], ["serve", "--help"]])
def test_output_to_a_full_device_is_one_line(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fleecer", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "fleecer: standard output: No space left on device\n")


@pytest.mark.parametrize("module", ["click", "fleecer.errors", "fleecer.app.signals", "fleecer.cli.status"])
def test_ctrl_c_during_imports_is_one_line(module: str) -> None:
    """The import of `module` is what Ctrl-C interrupts."""
    script = (
        "import importlib.abc, os, signal, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from fleecer.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, "status"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fleecer: interrupted\n")
