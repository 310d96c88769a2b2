"""What goes wrong with disks, told when it happens: a line in the log, and QEMU's events on the monitor.

BLOCK_IMAGE_CORRUPTED tells that an image contradicts itself and was given up, BLOCK_IO_ERROR that a client's request
failed. Whoever comes later finds the same in `of`.

Invariants: a request that succeeds costs nothing here; of those that fail on one export the first is told at once, and
then at most one in `TELL_AGAIN_S` for reads and one for changes, however many there are; what is a client's own mistake
is not told.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fleecer.block.node import Node
from fleecer.errors import FleecerError, told
from fleecer.export import Export

if TYPE_CHECKING:
    from fleecer.daemon.daemon import Daemon

TELL_AGAIN_S = 1.0
_CLIENTS_MISTAKES = frozenset((errno.EINVAL, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ESHUTDOWN))

_log = logging.getLogger(__name__)


class _Failures:
    """The failed requests of one export and kind: how many, how many of them nobody was told of, and the last."""

    __slots__ = ("count", "last", "quiet_until_s", "untold")

    def __init__(self) -> None:
        self.count = 0
        self.untold = 0
        self.last = ""
        self.quiet_until_s = float("-inf")


class Problems:
    """What is known to be wrong with the disks of one daemon. `clock` gives seconds that never go back."""

    def __init__(self, daemon: Daemon, clock: Callable[[], float] = time.monotonic) -> None:
        self._daemon = daemon
        self._clock = clock
        self._failures: dict[Export, dict[str, _Failures]] = {}
        daemon.graph.on_problem = self._gave_up

    def watch(self, export: Export) -> None:
        """Tells of requests that fail on this export, until `forget`."""
        self._failures[export] = {}
        export.on_failure = self._failed

    def forget(self, export: Export) -> None:
        """The export is gone."""
        self._failures.pop(export, None)
        export.on_failure = None

    def of(self, export: Export) -> str:
        """What is wrong with a disk, "" while nothing is known: why it was given up, else which requests failed."""
        for node in _made_of(export.edge.node):
            if node.problem is not None:
                return node.problem.message
        kinds = self._failures.get(export, {})
        told_of = [
            f"{failures.count} {operation} request{'s' * (failures.count > 1)} failed, the last: {failures.last}"
            for operation, failures in kinds.items()
        ]
        return "; ".join(told_of)

    def _gave_up(self, node: Node) -> None:
        problem = node.problem
        assert problem is not None, "a node tells of its problem when it has one"
        _log.warning("node %s is given up: %s", node.name, problem.message)
        if not problem.corrupt:
            return
        disk = next((export.name for export in self._daemon.disks() if node in _made_of(export.edge.node)), "")
        data: dict[str, object] = {"device": disk, "node-name": node.name, "msg": problem.message, "fatal": True}
        if problem.span is not None:
            data["offset"], data["size"] = problem.span
        self._daemon.events.announce("BLOCK_IMAGE_CORRUPTED", data)

    def _failed(self, export: Export, is_read: bool, error: FleecerError) -> None:
        kinds = self._failures.get(export)
        if kinds is None or error.errno in _CLIENTS_MISTAKES:
            return
        operation = "read" if is_read else "write"
        failures = kinds.setdefault(operation, _Failures())
        failures.count += 1
        failures.last = reason = told(error)
        now_s = self._clock()
        if now_s < failures.quiet_until_s:
            failures.untold += 1
            return
        failures.quiet_until_s = now_s + TELL_AGAIN_S
        more = f" ({failures.untold} more failed since the last such line)" if failures.untold else ""
        failures.untold = 0
        _log.warning("disk %s: %s%s", export.name, reason, more)
        self._daemon.events.announce(
            "BLOCK_IO_ERROR",
            {
                "device": export.name,
                "node-name": export.edge.node.name,
                "operation": operation,
                "action": "report",
                "nospace": error.errno == errno.ENOSPC,
                "reason": reason,
            },
        )


def _made_of(node: Node) -> list[Node]:
    """A node and what its data is read from, backing nodes included, nearest first. Scratches are no part of a disk."""
    found = [node]
    for one in found:
        found += [edge.node for at, edge in enumerate(one.children) if not at or edge.role == "backing"]
    return found
