"""A virtual machine boots from Fleecer and never stops writing; copies made of its disk meanwhile are judged.

The whole story happens once, in a fixture, for it takes a minute or two under software emulation; each test then judges
one side of it. The guest's console tells what was synced before a command began, and which round began after it ended,
so that nothing depends on how fast anything is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.guest import disk
from tests.guest.machine import Machine, booted
from tests.guest.processes import Daemon, fleecer, run, serving

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

TROUBLE = re.compile(r"I/O error|EXT4-fs|JBD2|\bvda\b|panic|Oops|blocked for more than", re.IGNORECASE)
"""What the guest's kernel, told to be quiet, says only when its disk fails or makes it wait too long."""

COUNTED_ANEW = re.compile(r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.|Fix\? no")
"""Totals in the superblock that Linux writes at an unmount and counts anew at a mount; e2fsck calls them no error."""

DISK = "web"


@dataclasses.dataclass
class Copy:
    """One copy of the disk: what bounds its instant, and what its file system holds."""

    synced_before: int
    """The last round that was synced before the command was given."""

    begun_after: int | None
    """A round that began after the command had ended; None if nothing tells."""

    image: Path
    """The disk as a raw image; removed by the end of the story."""

    findings: list[str] = dataclasses.field(default_factory=list)
    """What `e2fsck -fn` finds once the journal was replayed, and nothing else done."""

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Story:
    """What happened."""

    copies: dict[str, Copy] = dataclasses.field(default_factory=dict)
    console: list[str] = dataclasses.field(default_factory=list)
    synced_last: int = 0
    """The last round that the guest called synced."""

    snapshot_disks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What is told of the snapshot's disks before the snapshot is deleted."""

    snapshots_left: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    told: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each file, by name, as the machine booted from the second backup sees it."""

    second_console: list[str] = dataclasses.field(default_factory=list)


def command(machine: Machine, daemon: Daemon, *words: str | Path) -> tuple[int, int, Any]:
    """Runs a fleecer command while the guest writes.

    Returns the last round synced before, one that began after and is synced by now, and the command's JSON.
    """
    before = machine.synced()
    answer = json.loads(fleecer(*words, "--run-dir", daemon.run_directory, "--json"))
    after = machine.mark()
    machine.wait_for(f"SYNCED {after}")
    return before, after, answer


def back_up(story: Story, title: str, machine: Machine, daemon: Daemon, place: Path) -> Path:
    before, after, answer = command(machine, daemon, "backup", DISK, "--to", place / "backups")
    story.copies[title] = Copy(before, after, place / f"{title}.raw")
    (record,) = answer["disks"]
    return Path(record["path"])


def live(story: Story, linux: disk.Linux, image: Path, place: Path) -> dict[str, Path]:
    """The machine's life: it writes, and is copied three times. Returns the backups, by title."""
    with serving(DISK, image, place / "run") as daemon:
        with booted(linux, daemon.socket, DISK, disk.WRITER) as machine:
            machine.wait_for_rounds(20)
            before, after, snapshot = command(machine, daemon, "snapshot", "create")
            story.copies["snapshot"] = Copy(before, after, place / "snapshot.raw")
            backups = {title: back_up(story, title, machine, daemon, place) for title in ("first", "second")}
            machine.wait_for_rounds(20)
            run("nbdcopy", snapshot["disks"][0]["uri"], place / "snapshot.raw")
            _, _, listed = command(machine, daemon, "snapshot", "list")
            story.snapshot_disks = listed["snapshots"][0]["disks"]
            command(machine, daemon, "snapshot", "delete", snapshot["name"])
            _, _, listed = command(machine, daemon, "snapshot", "list")
            story.snapshots_left = listed["snapshots"]
        story.console = machine.lines
        story.synced_last = machine.synced()
    story.copies["live"] = Copy(story.synced_last, None, place / "live.raw")
    return backups


def judge(copy: Copy) -> None:
    """Finds out what a copy holds. Its own image stays as it is."""
    replayed = copy.image.with_name("replayed.raw")
    run("cp", "--sparse=always", copy.image, replayed)
    disk.replay_journal(replayed)
    copy.findings = disk.check(replayed)
    copy.files = disk.read_files(replayed)
    replayed.unlink()


def live_again(story: Story, linux: disk.Linux, image: Path, place: Path) -> None:
    """Another machine's life, on a raw image that is as the first machine's disk was at some instant."""
    with serving(DISK, image, place / "run") as daemon, booted(linux, daemon.socket, DISK, disk.READER) as machine:
        machine.wait_for("TOLD")
        machine.wait_for_the_end()
    story.second_console = machine.lines
    for line in machine.lines:
        if found := re.fullmatch(r"([0-9a-f]{64})  (\S+)", line):
            story.told[found[2]] = found[1]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """All of it, from one machine's boot to another's end. The images are gone when it has been told."""
    linux = disk.installed_linux()
    place = tmp_path_factory.mktemp("guest")
    story = Story()
    try:
        image = place / "web.qcow2"
        disk.make_disk(linux, image)
        backups = live(story, linux, image, place)
        run("qemu-img", "check", image)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, story.copies["live"].image)
        for title, backup in backups.items():
            fleecer("restore", backup, story.copies[title].image)
        for copy in story.copies.values():
            judge(copy)
        live_again(story, linux, story.copies["second"].image, place)
        assert disk.check(story.copies["second"].image) == []
    finally:
        shutil.rmtree(place)
    return story


@pytest.fixture(params=["snapshot", "first", "second", "live"])
def copy(request: pytest.FixtureRequest, story: Story) -> Copy:
    return story.copies[request.param]


def test_a_copy_is_the_disk_at_one_instant(copy: Copy) -> None:
    disk.check_instant(copy.files)


def test_what_was_synced_before_the_instant_is_in_the_copy(copy: Copy) -> None:
    for number in range(1, copy.synced_before + 1):
        assert copy.files[str(number)] == disk.text(number, disk.file_length(number))


@pytest.mark.parametrize("copy", ["snapshot", "first", "second"], indirect=True)
def test_what_was_written_after_the_instant_is_not_in_the_copy(copy: Copy) -> None:
    assert copy.begun_after is not None
    assert disk.last_round(copy.files) < copy.begun_after


def test_replaying_the_journal_is_all_that_a_copy_needs(copy: Copy) -> None:
    assert [line for line in copy.findings if not COUNTED_ANEW.fullmatch(line)] == []


def test_the_guest_saw_no_error(story: Story) -> None:
    assert [line for line in story.console + story.second_console if TROUBLE.search(line)] == []


def test_the_copies_are_of_different_instants_in_the_order_they_were_taken(story: Story) -> None:
    rounds = [disk.last_round(story.copies[title].files) for title in ("snapshot", "first", "second", "live")]
    assert rounds == sorted(set(rounds)), rounds


def test_the_snapshot_held_out_and_went_with_its_deletion(story: Story) -> None:
    (part,) = story.snapshot_disks
    assert part["state"] == "active"
    assert part["bytes_preserved"] >= disk.RING
    assert story.snapshots_left == []


def test_a_machine_boots_from_a_restored_backup_and_finds_the_same_files(story: Story) -> None:
    files = story.copies["second"].files
    assert story.told == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
