"""What a daemon is: a graph, NBD exports, jobs and snapshots, and the events they give rise to."""

from fleecer.daemon.daemon import Daemon
from fleecer.daemon.events import Events
from fleecer.daemon.snapshots import SnapshotPart, SnapshotSet

__all__ = ["Daemon", "Events", "SnapshotPart", "SnapshotSet"]
