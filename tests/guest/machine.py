"""A virtual machine, what it says on its console, and what is said to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.guest.disk import Linux
from tests.guest.processes import HANG_S, Lines, end, tool

COMMAND_LINE = "console=ttyS0 root=/dev/vda rw rootfstype=ext4 modules=ext4,virtio_blk quiet panic=-1"
DRIVE = "if=virtio,discard=unmap,werror=report,rerror=report"
"""The guest is to see every error: QEMU would stop the machine for some."""


class Machine:
    """A virtual machine whose disk is an NBD export, and what it says on its console."""

    def __init__(self, process: subprocess.Popen[str], console: Lines) -> None:
        self._process = process
        self._console = console
        self._marks = 0

    @property
    def lines(self) -> list[str]:
        """What it said so far."""
        return self._console.lines

    def synced(self) -> int:
        """The last round it called synced; 0 if none."""
        for line in reversed(self.lines):
            if line.startswith("SYNCED "):
                return int(line.removeprefix("SYNCED "))
        return 0

    def wait_for(self, pattern: str) -> str:
        """The first line of all that `pattern` matches whole, at once or when it comes."""
        return self._console.wait_for(pattern)

    def wait_for_rounds(self, count: int) -> None:
        """Returns when `count` more rounds are synced."""
        self.wait_for(f"SYNCED {self.synced() + count}")

    def mark(self) -> int:
        """A round that begins after this call did."""
        self._marks += 1
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the machine is gone, and the next line tells what it said last
            os.write(self._process.stdin.fileno(), b"%d\n" % self._marks)
        return int(self.wait_for(rf"MARK {self._marks} \d+").split()[2])

    def wait_for_the_end(self) -> None:
        """Returns when the guest has ended the machine."""
        status = self._process.wait(HANG_S)
        assert status == 0, f"the machine ended with {status}:\n{self._console.text()}"

    def close(self) -> None:
        """Pulls the plug, if the machine is still there."""
        end(self._process)
        self._console.close()
        if self._process.stdin is not None:
            self._process.stdin.close()


@contextmanager
def booted(linux: Linux, socket: Path, export: str, init: str) -> Iterator[Machine]:
    """Boots Linux from an NBD export, with `init` as its init; at the end the machine is off."""
    process = subprocess.Popen(
        [
            tool("qemu-system-x86_64"),
            *("-accel", os.environ.get("ACCEL", "tcg"), "-m", "256"),
            *("-kernel", linux.kernel, "-initrd", linux.initrd, "-append", f"{COMMAND_LINE} init={init}"),
            *("-drive", f"driver=nbd,server.type=unix,server.path={socket},export={export},{DRIVE}"),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    machine = Machine(process, Lines(process.stdout))
    try:
        yield machine
    finally:
        machine.close()
