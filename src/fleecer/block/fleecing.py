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
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from fleecer.block.copier import CLUSTER_SIZE_BYTES, TIMEOUT_S, Copier, OnError, Snapshot
from fleecer.block.edge import Edge
from fleecer.block.graph import DRAIN_TIMEOUT_S, FILTER_ROLE, SNAPSHOT_ROLE, Graph
from fleecer.block.node import Node
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.filter import FilterNode
from fleecer.errors import NotFound, PermissionConflict, UsageError, quoted


@dataclasses.dataclass(slots=True)
class Plan:
    """One disk's part of a cut.

    `scratch` is an attached, writable edge to where old data goes; the cut takes it over if it succeeds. `fresh` says
    that it was never written, and reads as zeroes. With `share`
    the filter already above the disk is used, if it too was made for sharing. `name` is the snapshot's, in messages.
    """

    node: Node
    scratch: Edge
    name: str
    fresh: bool = False
    share: bool = False
    filter_name: str | None = None
    on_error: OnError = "break-snapshot"
    timeout_s: float = TIMEOUT_S
    cluster_size_bytes: int = CLUSTER_SIZE_BYTES


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


async def cut(graph: Graph, plans: Sequence[Plan], *, timeout_s: float = DRAIN_TIMEOUT_S) -> list[Fleece]:
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
        for plan in plans:
            _follow_changes(graph, plan)
            _look_for_filter(graph, plan)
            chosen.update((id(edge), edge) for edge in graph.edges_to_cover(plan.node, plan.scratch.node))
        return list(chosen.values())

    done: list[Fleece] = []
    bypassed: list[CopyBeforeWriteNode] = []
    try:
        async with graph.drained(covered, timeout_s=timeout_s):
            try:
                for plan in plans:
                    done.append(_cut_one(graph, plan))  # noqa: PERF401 - if one fails, those done are taken back
            except BaseException:
                bypassed += [fleece.filter for fleece in reversed(done) if _uncut_drained(graph, fleece)]
                raise
    except BaseException:
        for filter_node in bypassed:
            await graph.drop_bypassed(filter_node)
        raise
    return done


def _cut_one(graph: Graph, plan: Plan) -> Fleece:
    _look_for_filter(graph, plan)  # the same disk may have been cut in this step under another name
    node, target = plan.node, plan.scratch.node
    if plan.share and isinstance(node, CopyBeforeWriteNode) and node.shared:
        snapshot = node.copier.take(plan.name, plan.scratch, fresh=plan.fresh)
        node.follow_scratches()
        return Fleece(node, snapshot, shared=True, hold=_hold(graph, node, plan))
    covered = graph.edges_to_cover(node, target)
    for edge in covered:
        if _may_grow(graph, edge):
            raise PermissionConflict(
                f"{edge} may make node {quoted(node.name)} grow, and what grows has no snapshot; choose the node above"
            )
    source = Edge(node, f"node {quoted(plan.filter_name or plan.name)}", FILTER_ROLE, writable=not node.read_only)
    copier = Copier(
        source,
        cluster_size_bytes=max(plan.cluster_size_bytes, target.limits.cluster_size_bytes),
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
    nodes = graph.nodes()
    while isinstance(plan.node, CopyBeforeWriteNode) and plan.node not in nodes:
        plan.node = plan.node.child.node
    if plan.node not in nodes:
        raise NotFound("node", plan.node.name)


def _look_for_filter(graph: Graph, plan: Plan) -> None:
    """Plans for the filter that stands on the disk already, if it may be shared."""
    if not plan.share:
        return
    for candidate in graph.nodes():
        if isinstance(candidate, CopyBeforeWriteNode) and candidate.shared and candidate.child.node is plan.node:
            plan.node = candidate
            return


def _uncut_drained(graph: Graph, fleece: Fleece) -> bool:
    """Takes back a cut of this very step; everything is still drained, so nothing was copied.

    Returns whether that took the filter out, for `Graph.drop_bypassed`.
    """
    fleece.copier.retire(fleece.snapshot)
    fleece.filter.follow_scratches()
    fleece.check_reads_by(None)
    graph.forget(fleece.hold)
    if fleece.copier.snapshots:
        return False
    graph.bypass(fleece.filter)
    return True


async def uncut(graph: Graph, fleece: Fleece, *, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
    """Ends a snapshot: its scratch goes as soon as nothing needs it, and the filter with its last snapshot.

    Nobody may be reading the snapshot any more. The disk's requests go on throughout. Raises IoError (ETIMEDOUT) if
    the disk does not come to rest so that the filter could be taken out; the filter then stays, idle and harmless.
    """
    await release_scratch(graph, fleece)
    await graph.detach(fleece.hold)
    filter_node = fleece.filter
    if filter_node.copier.snapshots or filter_node not in graph.nodes():
        return
    async with graph.drained(lambda: graph.parents(filter_node), timeout_s=timeout_s):
        if filter_node.copier.snapshots or filter_node not in graph.nodes():
            return  # somebody took a snapshot, or the filter out, while we waited our turn
        graph.bypass(filter_node)
    await graph.drop_bypassed(filter_node)


async def release_scratch(graph: Graph, fleece: Fleece) -> None:
    """Gives up what a snapshot holds, without touching the filter: for one that broke. Idempotent."""
    idle = fleece.copier.retire(fleece.snapshot)
    fleece.filter.follow_scratches()
    for scratch in idle:
        await graph.drain_and_detach(scratch)
