"""Fleecer: a storage daemon for live disks.

It serves disk images over NBD and hands out exact point-in-time copies of them while they are written. `Daemon` is the
whole of it in a program; docs/howto/embed.md shows how. What is named in `__all__` is the programming interface, and is
imported when it is first used; `fleecer.testing` has the fakes and the conformance suite for nodes of one's own.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # without importing typing: whoever starts the program waits for this module
if TYPE_CHECKING:
    from fleecer.block.edge import Edge
    from fleecer.block.node import Extent, Limits, Node
    from fleecer.block.nodes.filter import FilterNode
    from fleecer.daemon import Daemon, SnapshotPart, SnapshotSet
    from fleecer.errors import FleecerError, SnapshotBroken
    from fleecer.export import Export
    from fleecer.jobs import BackupJob, BackupRequest
    from fleecer.net.nbd_client import NbdClient
    from fleecer.net.stream import connect_tcp, connect_unix

__all__ = [
    "BackupJob",
    "BackupRequest",
    "Daemon",
    "Edge",
    "Export",
    "Extent",
    "FilterNode",
    "FleecerError",
    "Limits",
    "NbdClient",
    "Node",
    "SnapshotBroken",
    "SnapshotPart",
    "SnapshotSet",
    "connect_tcp",
    "connect_unix",
]

_HOMES = {
    "fleecer.block.edge": ("Edge",),
    "fleecer.block.node": ("Extent", "Limits", "Node"),
    "fleecer.block.nodes.filter": ("FilterNode",),
    "fleecer.daemon": ("Daemon", "SnapshotPart", "SnapshotSet"),
    "fleecer.errors": ("FleecerError", "SnapshotBroken"),
    "fleecer.export": ("Export",),
    "fleecer.jobs": ("BackupJob", "BackupRequest"),
    "fleecer.net.nbd_client": ("NbdClient",),
    "fleecer.net.stream": ("connect_tcp", "connect_unix"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'fleecer' has no attribute '{name}'")
    import importlib

    value: object = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
