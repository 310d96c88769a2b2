"""Cutting live disks: putting copy-before-write filters above them, all at one instant, and taking them away again.

Both fleecing schemes start here. A snapshot read through snapshot-access shares one filter with all others of its disk;
a target that is read directly, because the disk is in its backing chain (QEMU's first scheme), needs every copy for
itself, so it gets a filter of its own.

Invariants:
- The instant of a cut is one step: all edges concerned are drained, and nothing is awaited between the first disk and
  the last. Either every disk is cut or none is, and then the graph is as it was.
- Copies serialise whenever the disk is anywhere in the target's backing chain.
- A target through which the past is read directly answers no read once its snapshot broke or ended (`Node.check`):
  it would be the disk's present. Nor is it used again for another instant: it would be a mixture.
- Whoever writes to the disk otherwise than through the filter makes the cut fail; so does who may make it grow, and a
  target on which the disk itself depends.
- The filter stays until its last snapshot has ended, also while nobody uses the disk.
- The disk's requests are held back no longer than `CUT_TIMEOUT_S`, unless somebody asks for more. A scratch whose
  requests do not end is waited for by nobody who holds up others; it goes when they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence

from fleecer.block.copier import TIMEOUT_S, Copier, OnError, Snapshot, natural_cluster_size
from fleecer.block.edge import Edge
from fleecer.block.graph import FILTER_ROLE, SNAPSHOT_ROLE, Graph
from fleecer.block.node import Node
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.filter import FilterNode
from fleecer.errors import IoError, NotFound, PermissionConflict, UsageError, quoted

CUT_TIMEOUT_S = 5.0
"""How long a cut, or the end of one, holds the disk's requests back behind a slow one: guests give up after 30 s."""

RETRY_S = 5.0
"""How long after a filter could not be taken out that is tried again first; each time twice as long, up to the next."""
RETRY_MAX_S = 60.0
RETRY_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Plan:
    """One disk's part of a cut.

    `scratch` is an attached, writable edge to where old data goes; the cut takes it over if it succeeds. `fresh` says
    that it was never written, and reads as zeroes. With `share` the filter already above the disk is used, if it too
    was made for sharing. `name` is the snapshot's, in messages.
    `cluster_size_bytes` None leaves the unit of copying to the filter, or to what disk and scratch are
    (`natural_cluster_size`); see `Copier` for `on_error` and `timeout_s`.
    """

    node: Node
    scratch: Edge
    name: str
    fresh: bool = False
    share: bool = False
    filter_name: str | None = None
    on_error: OnError = "break-snapshot"
    timeout_s: float = TIMEOUT_S
    cluster_size_bytes: int | None = None


@dataclasses.dataclass(slots=True)
class Fleece:
    """One disk's snapshot in the graph: its filter, and the snapshot in the filter's copier."""

    filter: CopyBeforeWriteNode
    snapshot: Snapshot
    shared: bool
    hold: Edge
    """Keeps the filter above the disk while nobody uses the disk: whoever comes next must pass it."""
    shown_by: tuple[Node, ...] = ()
    """The nodes through which the past is read directly: the target, and those it is made of that lead to the disk."""

    @property
    def copier(self) -> Copier:
        """The copier that keeps the snapshot."""
        return self.filter.copier

    def check_reads_by(self, check: Callable[[], None] | None) -> None:
        """Makes `check` the judge of what is read through the target; see `Node.check`."""
        for node in self.shown_by:
            node.check = check


def check_scratch(node: Node, scratch: Node) -> None:
    """Raises UsageError unless `scratch` can hold the old data of `node`."""
    if scratch.size != node.size:
        raise UsageError(
            f"target {quoted(scratch.name)} has {scratch.size} bytes, the disk {quoted(node.name)} has {node.size}; "
            "they must be equal"
        )


async def cut(graph: Graph, plans: Sequence[Plan], *, timeout_s: float = CUT_TIMEOUT_S) -> list[Fleece]:
    """Takes a snapshot of every disk planned, all of the same instant, while requests go on.

    On return each is in force: no write that follows changes what it reads. Raises what made it impossible
    (PermissionConflict, UsageError, IoError on a disk that did not come to rest in `timeout_s`); then nothing changed,
    and the scratch edges are still the caller's.
    """
    for plan in plans:
        check_scratch(plan.node, plan.scratch.node)
        if any(node.check is not None for node in _made_of(plan.scratch.node)):
            target = quoted(plan.scratch.node.name)
            raise UsageError(f"target {target} holds the past of an earlier instant; make a new one for each")
        if graph.reaches(plan.node, plan.scratch.node):
            target = quoted(plan.scratch.node.name)
            raise UsageError(f"target {target} is the disk {quoted(plan.node.name)} itself, or is part of it")
        if plan.filter_name is not None:
            graph.claim_name(plan.filter_name)

    def covered() -> list[Edge]:
        chosen: dict[int, Edge] = {}
        filters = _shared_filters(graph)
        for plan in plans:
            _follow_changes(graph, plan)
            _plan_for_filter(filters, plan)
            chosen.update((id(edge), edge) for edge in graph.edges_to_cover(plan.node, plan.scratch.node))
        return list(chosen.values())

    done: list[Fleece] = []
    async with graph.drained(covered, timeout_s=timeout_s):
        try:
            filters = _shared_filters(graph)
            for plan in plans:
                _plan_for_filter(filters, plan)  # the same disk may have been cut in this step under another name
                fleece = _cut_one(graph, plan)
                done.append(fleece)
                if fleece.shared:
                    filters[fleece.filter.child.node] = fleece.filter
        except BaseException:
            for fleece in reversed(done):
                _uncut_drained(graph, fleece)
            raise
    return done


def _cut_one(graph: Graph, plan: Plan) -> Fleece:
    node, target = plan.node, plan.scratch.node
    if plan.share and isinstance(node, CopyBeforeWriteNode) and node.shared:
        _check_cluster_size(node, plan)
        snapshot = node.copier.take(
            plan.name, plan.scratch, fresh=plan.fresh, on_error=plan.on_error, timeout_s=plan.timeout_s
        )
        node.follow_scratches()
        return Fleece(node, snapshot, shared=True, hold=_hold(graph, node, plan))
    covered = graph.edges_to_cover(node, target)
    for edge in covered:
        if _may_grow(graph, edge):
            raise PermissionConflict(
                f"{edge} may make node {quoted(node.name)} grow, and what grows has no snapshot; choose the node above"
            )
    natural = natural_cluster_size(node.size, target.limits.preferred_bytes)
    source = Edge(node, f"node {quoted(plan.filter_name or plan.name)}", FILTER_ROLE, writable=not node.read_only)
    copier = Copier(
        source,
        cluster_size_bytes=max(plan.cluster_size_bytes or natural, target.limits.cluster_size_bytes),
        on_error=plan.on_error,
        timeout_s=plan.timeout_s,
    )
    filter_node = CopyBeforeWriteNode(plan.filter_name or graph.fresh_name(), copier, shared=plan.share)
    graph.insert(filter_node, source, covered)
    fleecing = graph.reaches(target, node)
    snapshot = copier.take(plan.name, plan.scratch, fresh=plan.fresh and not fleecing, serialising=fleecing)
    filter_node.follow_scratches()
    shown_by = tuple(made_of for made_of in _made_of(target) if graph.reaches(made_of, node))
    fleece = Fleece(filter_node, snapshot, shared=plan.share, hold=_hold(graph, filter_node, plan), shown_by=shown_by)
    fleece.check_reads_by(snapshot.check)  # whoever reads the past through the target hears of it if that breaks
    return fleece


def _check_cluster_size(filter_node: CopyBeforeWriteNode, plan: Plan) -> None:
    """Raises UsageError where the plan asks for another unit of copying than the disk's snapshots have."""
    present = filter_node.copier.cluster_size_bytes
    if plan.cluster_size_bytes not in (None, present):
        raise UsageError(
            f"cluster size {plan.cluster_size_bytes} for {quoted(plan.name)}: the snapshots of node "
            f"{quoted(filter_node.child.node.name)} have one of {present} bytes, which all of them share until the "
            "last is deleted; ask for that, or for none"
        )


def _made_of(node: Node) -> list[Node]:
    """The node and what holds its data further down: filters' children, the files of formats, no backing nodes."""
    found = [node]
    while found[-1].children:
        found.append(found[-1].children[0].node)
    return found


def _hold(graph: Graph, filter_node: CopyBeforeWriteNode, plan: Plan) -> Edge:
    return graph.attach(filter_node, f"snapshot {quoted(plan.name)}", SNAPSHOT_ROLE)


def _may_grow(graph: Graph, edge: Edge) -> bool:
    """Whether writes by `edge` may pass the node's end: filters let those pass that their own holders may make."""
    holder = graph.holder(edge)
    return edge.may_grow and (
        not isinstance(holder, FilterNode) or any(_may_grow(graph, above) for above in graph.parents(holder))
    )


def _follow_changes(graph: Graph, plan: Plan) -> None:
    """Plans for what the node led to, if it was a filter that went while we waited for our turn."""
    while isinstance(plan.node, CopyBeforeWriteNode) and not graph.has(plan.node):
        plan.node = plan.node.child.node
    if not graph.has(plan.node):
        raise NotFound("node", plan.node.name)


def _shared_filters(graph: Graph) -> dict[Node, CopyBeforeWriteNode]:
    """The filters that further snapshots of a disk may share, by what they stand on."""
    return {node.child.node: node for node in graph.nodes() if isinstance(node, CopyBeforeWriteNode) and node.shared}


def _plan_for_filter(filters: dict[Node, CopyBeforeWriteNode], plan: Plan) -> None:
    """Plans for the filter that stands on the disk already, if it may be shared."""
    if plan.share:
        plan.node = filters.get(plan.node, plan.node)


def _uncut_drained(graph: Graph, fleece: Fleece) -> None:
    """Takes back a cut of this very step; everything is still drained, so nothing was copied."""
    fleece.copier.retire(fleece.snapshot)
    fleece.filter.follow_scratches()
    fleece.check_reads_by(None)
    graph.forget(fleece.hold)
    if not fleece.copier.snapshots:
        graph.bypass(fleece.filter)


async def uncut(
    graph: Graph, fleece: Fleece, *, timeout_s: float = CUT_TIMEOUT_S, leave_timeout_s: float | None = None
) -> None:
    """Ends a snapshot: its scratch goes as soon as nothing needs it, and the filter with its last snapshot.

    Nobody should be reading the snapshot any more; who does gets errors. The disk's requests go on throughout. Waited
    for last, no longer than `leave_timeout_s`, are requests in flight on a scratch, and the file system that frees it,
    which for one of many pieces takes seconds; then they are left to end by themselves, and a warning says so. Raises
    IoError (ETIMEDOUT) if the disk does not come to rest in `timeout_s` so that the filter could be taken out; idle and
    harmless, it is taken out as soon as the disk does. A caller who is cancelled leaves it all to go on.
    """
    await asyncio.shield(graph.keep(_uncut(graph, fleece, timeout_s, leave_timeout_s)))


async def _uncut(graph: Graph, fleece: Fleece, timeout_s: float, leave_timeout_s: float | None) -> None:
    leaving = _let_scratches_go(graph, fleece)
    leaving.append(graph.let_go(fleece.hold))
    try:
        leaving.append(await _take_out(graph, fleece.filter, timeout_s))
    except IoError:
        graph.keep_trying(_take_out_later(graph, fleece.filter))
        raise
    if not await graph.left(leaving, timeout_s=leave_timeout_s):
        _log.warning(
            "snapshot %s has ended, but what it used is still held after %g s: requests are in flight, or the file "
            "system is still freeing its scratch; it is given back once that is done",
            fleece.snapshot.name,
            leave_timeout_s,
        )


async def _take_out(graph: Graph, filter_node: CopyBeforeWriteNode, timeout_s: float) -> asyncio.Task[None] | None:
    """Takes a filter out unless it has snapshots, or is out already. Raises as `Graph.drained`."""
    if _is_needless(graph, filter_node):
        async with graph.drained(lambda: graph.parents(filter_node), timeout_s=timeout_s):
            if _is_needless(graph, filter_node):  # somebody may have been quicker while we waited our turn
                return graph.bypass(filter_node)
    return None


async def _take_out_later(graph: Graph, filter_node: CopyBeforeWriteNode) -> None:
    """Tries again and again to take a filter out whose disk did not come to rest, holding guests up but little."""
    wait_s = RETRY_S
    while _is_needless(graph, filter_node):
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, RETRY_MAX_S)
        with contextlib.suppress(IoError):
            await _take_out(graph, filter_node, RETRY_TIMEOUT_S)


def _is_needless(graph: Graph, filter_node: CopyBeforeWriteNode) -> bool:
    return not filter_node.copier.snapshots and graph.has(filter_node)


async def release_scratch(graph: Graph, fleece: Fleece) -> None:
    """Gives up what a snapshot holds, without touching the filter: for one that broke. Idempotent.

    Returns when the requests in flight on it have ended, which may take for ever.
    """
    await graph.left(_let_scratches_go(graph, fleece))


def _let_scratches_go(graph: Graph, fleece: Fleece) -> list[asyncio.Task[None] | None]:
    idle = fleece.copier.retire(fleece.snapshot)
    fleece.filter.follow_scratches()
    return [graph.let_go(scratch) for scratch in idle]
