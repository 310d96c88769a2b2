"""Ways to keep a disk's past, each in three steps: what may be done beforehand, the cut, and giving it to readers.

Only the cut is timed where the time of a cut is measured; so peers get their scratch images and nodes for nothing.
What a scheme leaves behind goes with its server, but for scratch files, which `close` removes.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod

from bench.figures import FLEECER
from bench.images import Images
from bench.subjects import SchemeName, Server, Subject

CLUSTER_BYTES = 64 << 10
"""Touches are this far apart: no unit of copying met here is larger, and QEMU's is this."""


class Scheme(ABC):
    """One way, on one server; each disk is cut once."""

    cluster_bytes = CLUSTER_BYTES  # what is copied for a small write; on disks of this size

    def __init__(self, server: Server, images: Images) -> None:
        self.server = server
        self.images = images
        self._scratches: list[str] = []

    @abstractmethod
    def prepare(self) -> None:
        """Does what can be done before the cut."""

    @abstractmethod
    def cut(self) -> None:
        """Makes this instant the past, of all disks."""

    @abstractmethod
    def publish(self) -> str:
        """Gives the first disk's past to readers; its export's name."""

    def preserved_bytes(self) -> int:
        """How much old data of the first disk is kept by now."""
        return os.stat(self._scratches[0]).st_blocks * 512

    def close(self) -> None:
        """Removes scratch files. The server may still run."""
        for path in self._scratches:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


class Native(Scheme):
    """Fleecer's own: one command."""

    cluster_bytes = 4 << 10

    def __init__(self, server: Server, images: Images) -> None:
        super().__init__(server, images)
        self._export = ""

    def prepare(self) -> None:
        pass  # the command does all

    def cut(self) -> None:
        taken = self.server.qmp.execute("snapshot-create", {"name": "past"})
        self._export = next(disk["export"] for disk in taken["disks"] if disk["name"] == self.server.disks[0].name)

    def publish(self) -> str:
        return self._export

    def preserved_bytes(self) -> int:
        disks = self.server.qmp.execute("query-snapshots")[0]["disks"]
        return int(next(disk["bytes-preserved"] for disk in disks if disk["name"] == self.server.disks[0].name))


class Filter(Scheme):
    """QEMU's newer one: copy-before-write put below the export, snapshot-access to read, a raw scratch."""

    def prepare(self) -> None:
        for index, disk in enumerate(self.server.disks):
            path = self.images.path("scratch.raw")
            with open(path, "xb") as file:
                self._scratches.append(path)
                file.truncate(disk.size)
            options = {"driver": "file", "node-name": f"scratch{index}", "filename": path, "discard": "unmap"}
            self.server.qmp.execute("blockdev-add", options)
            options = {"driver": "copy-before-write", "node-name": f"cbw{index}", "file": f"disk{index}"}
            options |= {"target": f"scratch{index}", "on-cbw-error": "break-snapshot"}
            self.server.qmp.execute("blockdev-add", options)

    def cut(self) -> None:
        tops = [
            {"driver": "raw", "node-name": f"top{index}", "file": f"cbw{index}"}
            for index in range(len(self.server.disks))
        ]
        self.server.qmp.execute("blockdev-reopen", {"options": tops})

    def publish(self) -> str:
        options = {"driver": "snapshot-access", "node-name": "past0", "file": "cbw0"}
        self.server.qmp.execute("blockdev-add", options)
        self.server.qmp.execute("block-export-add", {"type": "nbd", "id": "past0", "node-name": "past0"})
        return "past0"


class BackupJob(Scheme):
    """The first scheme there was: blockdev-backup with sync=none into a qcow2 image over the live disk."""

    def __init__(self, server: Server, images: Images, *options: str) -> None:
        super().__init__(server, images)
        self._options = options

    def prepare(self) -> None:
        for index, disk in enumerate(self.server.disks):
            scratch = self.images.empty("qcow2", disk.size, *self._options, name=f"scratch{index}")
            self._scratches.append(scratch.path)
            file = {"driver": "file", "filename": scratch.path}
            options = {"driver": "qcow2", "node-name": f"scratch{index}", "file": file, "backing": f"disk{index}"}
            self.server.qmp.execute("blockdev-add", options)

    def cut(self) -> None:
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": f"past{index}",
                    "device": f"disk{index}",
                    "target": f"scratch{index}",
                    "sync": "none",
                },
            }
            for index in range(len(self.server.disks))
        ]
        self.server.qmp.execute("transaction", {"actions": actions})

    def publish(self) -> str:
        arguments = {"type": "nbd", "id": "past0", "node-name": "scratch0", "name": "past0"}
        self.server.qmp.execute("block-export-add", arguments)
        return "past0"


def scheme(name: SchemeName, subject: Subject, server: Server, images: Images) -> Scheme:
    """The scheme of that name as a subject does it: "snapshot" is what each has that is newest."""
    if name == "backup-job":
        return BackupJob(server, images)
    if name == "backup-job-extended":
        job = BackupJob(server, images, "-o", "extended_l2=on")
        if subject.family == FLEECER:
            job.cluster_bytes = 4 << 10
        return job
    return Native(server, images) if subject.family == "fleecer" else Filter(server, images)
