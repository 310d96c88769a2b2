"""The two ways to take a snapshot of the daemon's disks, by QMP: QEMU's first fleecing scheme, and `snapshot-create`.

Each can be starved: the place for old data fills up soon, and the snapshot must break then, and nothing else.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from fleecer.errors import FleecerError
from tests.soak.daemon import DaemonProcess

_ENOSPC = 28
_STARVED_WRITES = 60


class Scheme(Protocol):
    """One snapshot of some disks. `export` names a disk's part; `create` begins where nothing is left to prepare."""

    starved: bool

    async def prepare(self) -> None:
        """What comes before the instant."""
        ...

    async def create(self) -> None:
        """The command that makes the instant."""
        ...

    async def publish(self) -> None:
        """What must follow before it can be read."""
        ...

    def export(self, disk: str) -> str:
        """The export of a disk's part."""
        ...

    async def broken(self) -> dict[str, str]:
        """Why, for each disk whose part is broken."""
        ...

    async def drop(self) -> None:
        """Ends it, its readers with it."""
        ...

    def clean_up(self) -> None:
        """Removes files of ours, if there are any; the daemon is dead, or has let go of them."""
        ...


class Second:
    """`snapshot-create`; old data goes into unlinked files."""

    def __init__(self, daemon: DaemonProcess, name: str, disks: list[str], scratch: Path | None, *, starved: bool):
        self.starved = starved
        self._daemon = daemon
        self._name = name
        self._disks = disks
        self._scratch = scratch

    async def prepare(self) -> None:
        """Nothing."""

    async def create(self) -> None:
        """All disks at one instant."""
        arguments = {"name": self._name, "disks": self._disks}
        if self._scratch is not None:
            arguments["scratch-dir"] = str(self._scratch)
        await self._daemon.execute("snapshot-create", arguments)

    async def publish(self) -> None:
        """Nothing: it is exported already."""

    def export(self, disk: str) -> str:
        """See `Scheme`."""
        return f"{disk}@{self._name}"

    async def broken(self) -> dict[str, str]:
        """See `Scheme`."""
        found = await self._daemon.execute("query-snapshots")
        parts = [part for taken in found if taken["name"] == self._name for part in taken["disks"]]
        return {part["name"]: part["cause"] for part in parts if part["state"] == "broken"}

    async def drop(self) -> None:
        """See `Scheme`."""
        await self._daemon.execute("snapshot-delete", {"name": self._name})

    def clean_up(self) -> None:
        """Nothing: the files have no names."""


class First:
    """QEMU's: a qcow2 image per disk whose backing is the live disk, and backup jobs with sync=none."""

    def __init__(self, daemon: DaemonProcess, name: str, disks: list[str], directory: Path, *, starved: bool):
        self.starved = starved
        self._daemon = daemon
        self._name = name
        self._disks = disks
        self._targets = {disk: directory / f"{name}-{disk}.qcow2" for disk in disks}

    async def prepare(self) -> None:
        """The targets, opened on the live disks."""
        sizes = {disk["name"]: disk["size"] for disk in await self._daemon.execute("query-disks")}
        for number, (disk, path) in enumerate(self._targets.items()):
            options = ("-o", "extended_l2=on") if number % 2 else ()
            maker = await asyncio.create_subprocess_exec(
                *("qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(sizes[disk])),
                start_new_session=True,
            )
            if await maker.wait():
                raise RuntimeError(f"qemu-img could not create {path}")
            file: dict[str, object] = {"driver": "file", "filename": str(path)}
            if self.starved:
                rule = {"operation": "write", "errno": _ENOSPC, "after": _STARVED_WRITES}
                file = {"driver": "fault", "file": file, "rules": [rule]}
            node = {"driver": "qcow2", "node-name": self.export(disk), "file": file, "backing": disk}
            await self._daemon.execute("blockdev-add", node)

    async def create(self) -> None:
        """One transaction."""
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": f"job-{self.export(disk)}",
                    "device": disk,
                    "target": self.export(disk),
                    "sync": "none",
                    "auto-dismiss": False,
                },
            }
            for disk in self._disks
        ]
        await self._daemon.execute("transaction", {"actions": actions})

    async def publish(self) -> None:
        """The exports."""
        for disk in self._disks:
            name = self.export(disk)
            arguments = {"type": "nbd", "id": name, "node-name": name, "name": name}
            await self._daemon.execute("block-export-add", arguments)

    def export(self, disk: str) -> str:
        """See `Scheme`. The target node has the same name."""
        return f"{self._name}-{disk}"

    async def broken(self) -> dict[str, str]:
        """See `Scheme`."""
        errors = {job["id"]: job.get("error") for job in await self._daemon.execute("query-jobs")}
        causes = {disk: errors.get(f"job-{self.export(disk)}") for disk in self._disks}
        return {disk: cause for disk, cause in causes.items() if cause}

    async def drop(self) -> None:
        """See `Scheme`."""
        for disk in self._disks:
            await self._daemon.execute("block-export-del", {"id": self.export(disk), "mode": "hard"})
        for disk in self._disks:
            job = f"job-{self.export(disk)}"
            if not await self._has_concluded(job):
                try:
                    await self._daemon.execute("job-cancel", {"id": job})
                except FleecerError:
                    if not await self._has_concluded(job):  # as it may have between question and command, by breaking
                        raise
            await self._daemon.execute("job-dismiss", {"id": job})
            try:
                await self._daemon.execute("blockdev-del", {"node-name": self.export(disk)})
            except FleecerError:
                if not self.starved:  # such a target cannot be closed without an error, but it goes
                    raise
        self.clean_up()

    async def _has_concluded(self, job: str) -> bool:
        states = {found["id"]: found["status"] for found in await self._daemon.execute("query-jobs")}
        return bool(states[job] == "concluded")

    def clean_up(self) -> None:
        """The target files."""
        for path in self._targets.values():
            path.unlink(missing_ok=True)
