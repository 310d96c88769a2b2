"""The graph: which nodes there are, which edges hold them, and changing that under running requests.

Invariants:
- Every edge is made by `attach` and ended by `detach`; a node without edges that its owner did not name is closed.
- Two edges of a node never conflict: none writes where another does not share writing. The same holds along first
  children, which hold the same data: whoever does not share a node's writing does not share what it is made of.
- A live change closes the gates of all edges concerned, waits until no request is in flight behind any, changes, and
  opens them: what is done inside `drained` is one instant for every request.
- One drain at a time; those who drain wait for one another, and never while they hold a gate.
- Of two edges to be drained, one of which serves the other's requests, the upper one comes to rest first.
- A node is closed when nothing is in flight on its edges, to it and to its children.
- What has to wait for requests of others, but need hold up nobody, is kept here and goes on by itself (`let_go`,
  `keep`); `close` gives it `LEAVE_TIMEOUT_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable
from typing import Any

from fleecer import eager
from fleecer.block.edge import Edge
from fleecer.block.node import Node
from fleecer.errors import FleecerError, InUse, IoError, NotFound, PermissionConflict, UsageError, quoted, told

DRAIN_TIMEOUT_S = 30.0
LEAVE_TIMEOUT_S = 5.0
"""How long somebody who ends something waits for requests that do not end: a scratch on a file server that is gone."""
FILTER_ROLE = "filtered"
"""Role of the edge from a copy-before-write filter to its disk: whoever wants the disk must use the filter."""
SNAPSHOT_ROLE = "snapshot"
"""Role of an edge that keeps a filter alive for a snapshot but carries no request; filters leave it alone."""
NODES_MAX = 16384

_log = logging.getLogger(__name__)


class Graph:
    """The nodes of one daemon (or one embedding program), by name."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._named: set[str] = set()  # kept until `remove`, edges or not
        self._edges: dict[Node, list[Edge]] = {}
        self._drain_lock = asyncio.Lock()
        self._kept: set[asyncio.Task[None]] = set()
        self._trying: set[asyncio.Task[None]] = set()
        self._serial = 0
        # Called when a node gives itself up (`Node.problem`). Must not raise, wait or change the graph.
        self.on_problem: Callable[[Node], None] | None = None

    # Nodes.

    def fresh_name(self) -> str:
        """A name for a node that nobody named, as QEMU makes them: "#block17". Users cannot choose such a name."""
        self._serial += 1
        return f"#block{self._serial:03d}"

    def claim_name(self, name: str) -> None:
        """Raises UsageError unless `name` is free and well-formed."""
        if name in self._nodes:
            raise UsageError(f"node name {quoted(name)} is taken; choose another")
        if len(self._nodes) >= NODES_MAX:
            raise UsageError(f"there are {NODES_MAX} nodes, which is the limit")

    def add(self, node: Node, *, named: bool) -> None:
        """Registers an open node. With `named` it stays until `remove`; else until its last edge goes."""
        self.claim_name(node.name)
        self._nodes[node.name] = node
        node.on_problem = self._tell_problem
        self._edges.setdefault(node, [])
        if named:
            self._named.add(node.name)

    def _tell_problem(self, node: Node) -> None:
        if self.on_problem is not None:
            self.on_problem(node)

    def find(self, name: str) -> Node:
        """The node of that name. Raises NotFound."""
        try:
            return self._nodes[name]
        except KeyError:
            raise NotFound("node", name) from None

    def nodes(self) -> list[Node]:
        """Every node, in the order of registration."""
        return list(self._nodes.values())

    def has(self, node: Node) -> bool:
        """Whether `node` is registered."""
        return self._nodes.get(node.name) is node

    def parents(self, node: Node) -> tuple[Edge, ...]:
        """The edges that lead to `node`."""
        return tuple(self._edges.get(node, ()))

    async def remove(self, name: str) -> None:
        """Closes a named node. Raises NotFound, or InUse while an edge leads to it."""
        node = self.find(name)
        if name not in self._named:
            holder = self._edges[node][0] if self._edges[node] else "its parent"
            raise InUse(f"node {quoted(name)} belongs to {holder} and goes with it")
        if self._edges[node]:
            raise InUse(f"node {quoted(name)} is in use by {self._edges[node][0]}; remove that first")
        self._named.discard(name)
        await self._close(node)

    async def close(self) -> None:
        """Closes every node, parents before children. Raises the first failure after trying all.

        What was let go has `LEAVE_TIMEOUT_S` to end. A node with requests in flight even then is not closed, lest they
        meet another file under its descriptor: it is left as it is, and a warning says so.
        """
        failures: list[FleecerError] = []
        self._named.clear()
        for task in self._trying:
            task.cancel()
        await self.left(list(self._kept), timeout_s=LEAVE_TIMEOUT_S)
        while self._nodes:
            node = self._parentless()
            busy = next((edge for edge in self._edges.get(node, ()) if edge.busy), None)
            if busy is not None:
                _log.warning("node %s is not closed: %d requests of %s do not end", quoted(node.name), busy.busy, busy)
                del self._nodes[node.name]
                continue
            try:
                await self._close(node)
            except FleecerError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _parentless(self) -> Node:
        """A node that is no other's child."""
        children = {edge.node for node in self._nodes.values() for edge in node.children}
        return next(node for node in self._nodes.values() if node not in children)

    async def _close(self, node: Node) -> None:
        self._nodes.pop(node.name, None)
        try:
            await node.close()
        finally:
            children, node.children = node.children, ()
            for edge in children:
                await self.drain_and_detach(edge)  # a copy that was given up may be in flight on it
            self._edges.pop(node, None)

    # Edges.

    def attach(
        self,
        node: Node,
        parent: str,
        role: str,
        *,
        writable: bool = False,
        shares_write: bool = True,
        may_grow: bool = False,
    ) -> Edge:
        """A new edge to `node`. Raises PermissionConflict; then nothing changed."""
        if writable and node.read_only:
            raise PermissionConflict(
                f"{parent} ({role}) wants to write to node {quoted(node.name)}, which is read-only"
            )
        edge = Edge(node, parent, role, writable=writable, shares_write=shares_write, may_grow=may_grow)
        _check_permissions(node, edge, self._edges[node])
        self._check_below(node, edge)
        self._check_above(node, edge)
        self._edges[node].append(edge)
        return edge

    async def detach(self, edge: Edge) -> None:
        """Ends an edge, which must have no request in flight. Closes the node if nothing else holds it."""
        node = edge.node
        holders = self._edges.get(node)
        if holders is None or edge not in holders:
            return
        holders.remove(edge)
        edge.end()
        if not holders and node.name in self._nodes and node.name not in self._named:
            await self._close(node)

    def forget(self, edge: Edge) -> None:
        """Ends an edge made just now, whose node stays in any case."""
        self._edges[edge.node].remove(edge)

    async def discard_unused(self, node: Node) -> None:
        """Closes a node that was made for a parent which did not come to be."""
        if not self._edges.get(node) and node.name in self._nodes:
            self._named.discard(node.name)
            await self._close(node)

    async def drain_and_detach(self, edge: Edge) -> None:
        """Waits for the requests in flight on `edge`, lets no new one start, and ends it."""
        edge.close_gate()
        await edge.idle()
        await self.detach(edge)

    def let_go(self, edge: Edge) -> asyncio.Task[None] | None:
        """As `drain_and_detach`, for a caller who need not wait: no new request starts from now on.

        Returns None if that is done, else the task in which it goes on, kept here. A failure to close the node is
        logged.
        """
        edge.close_gate()
        task = eager.start(self._let_go(edge))
        return None if task is None else self._keep(task)

    async def _let_go(self, edge: Edge) -> None:
        try:
            await edge.idle()
            await self.detach(edge)
        except FleecerError as error:
            _log.warning("giving up %s: %s", edge, told(error))

    def keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs `work` to its end in a task of its own, whatever becomes of the caller, who may await or shield it."""
        return self._keep(asyncio.get_running_loop().create_task(work))

    def keep_trying(self, work: Coroutine[Any, Any, None]) -> None:
        """As `keep`, for what is given up when the graph is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self._trying.add(task)
        task.add_done_callback(self._trying.discard)

    def _keep(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        return task

    async def left(self, leaving: Iterable[asyncio.Task[None] | None], *, timeout_s: float | None = None) -> bool:
        """Waits for what `let_go` or `keep` returned, but no longer than `timeout_s`. Returns whether all has ended.

        Being cancelled here ends none of it.
        """
        tasks = [task for task in leaving if task is not None and not task.done()]
        return not tasks or not (await asyncio.wait(tasks, timeout=timeout_s))[1]

    def top(self, node: Node) -> Node:
        """The topmost filter that protects `node` against changes that pass it by, or `node` itself."""
        for edge in self._edges[node]:
            holder = self.holder(edge) if edge.role == FILTER_ROLE else None
            if holder is not None:
                return self.top(holder)
        return node

    def holder(self, edge: Edge) -> Node | None:
        """The node whose child `edge` leads to; None for the edge of an export or a job."""
        return next((node for node in self._nodes.values() if edge in node.children), None)

    def _check_below(self, node: Node, edge: Edge) -> None:
        """Raises PermissionConflict where `edge` shares no writing of `node`, and somebody writes to it further down.

        A node's first child holds the same data as it; a backing node is another disk.
        """
        while not edge.shares_write and node.children and node.children[0].role != SNAPSHOT_ROLE:
            way = node.children[0]
            node = way.node
            others = [other for other in self.parents(node) if other is not way and other.writable]
            _check_permissions(node, edge, others)

    def _check_above(self, node: Node, edge: Edge) -> None:
        """Raises PermissionConflict where `edge` writes to `node`, and somebody does not share that further up."""
        for way in self.parents(node) if edge.writable else ():
            holder = self.holder(way)
            if holder is not None and way is holder.children[0] and way.role != SNAPSHOT_ROLE:
                _check_permissions(node, edge, [other for other in self.parents(holder) if not other.shares_write])
                self._check_above(holder, edge)

    def reaches(self, start: Node, target: Node) -> bool:
        """Whether `target` is `start` or anywhere below it (backing chain, filters, files)."""
        seen: set[int] = set()
        heap = [start]
        while heap:
            node = heap.pop()
            if node is target:
                return True
            if id(node) not in seen:
                seen.add(id(node))
                heap += [edge.node for edge in node.children]
        return False

    # Changing the graph under way.

    @contextlib.asynccontextmanager
    async def drained(
        self, choose: Callable[[], Iterable[Edge]], *, timeout_s: float = DRAIN_TIMEOUT_S
    ) -> AsyncIterator[None]:
        """Inside, no request is in flight on the edges that `choose` names, and none starts. Later they go on.

        `choose` is asked again after each wait, so that what was attached meanwhile is drained too. Raises IoError
        (ETIMEDOUT) naming the edge whose requests did not end in `timeout_s`; then all go on as before.
        """
        async with self._drain_lock:
            deadline = asyncio.get_running_loop().time() + timeout_s
            closed: list[Edge] = []
            try:
                while upper := self._uppermost([edge for edge in choose() if edge not in closed]):
                    for edge in upper:
                        edge.close_gate()
                        closed.append(edge)
                    await _all_idle(upper, deadline, timeout_s)
                yield
            finally:
                for edge in closed:
                    edge.open_gate()

    def edges_to_cover(self, node: Node, target: Node | None = None) -> list[Edge]:
        """The edges a filter put above `node` takes over: all that write to it, save those from below `target`.

        `target` is what the filter copies to: where `node` is in its backing chain, that edge must go on to read
        `node` itself, else the filter would stand above its own target. Readers stay: they miss nothing, and a target
        that is to be used later keeps its way to the disk.
        """
        below = self._subtree_edges(target) if target is not None else set()
        return [
            edge for edge in self._edges[node] if edge.writable and id(edge) not in below and edge.role != SNAPSHOT_ROLE
        ]

    def insert(self, filter_node: Node, below: Edge, covered: Iterable[Edge]) -> None:
        """Puts `filter_node` between the drained edges `covered` and their node, to which its edge `below` leads.

        The filter lives as long as it has edges. Raises PermissionConflict before anything changed, where somebody
        outside `covered` writes to the node, or to what it is made of: the filter would not see those writes.
        """
        node = below.node
        moving = list(covered)
        below.shares_write = False
        _check_permissions(node, below, [edge for edge in self._edges[node] if edge not in moving])
        self._check_below(node, below)
        self.add(filter_node, named=False)
        self._edges[node].append(below)
        self._move(moving, filter_node)

    def bypass(self, filter_node: Node) -> asyncio.Task[None] | None:
        """Makes every drained edge to `filter_node` lead to its first child instead, and closes the filter.

        It is closed once its own requests have ended, such as reads of background copies: None if that is done, else
        the task that does it, as for `let_go`.
        """
        self._move(self.parents(filter_node), filter_node.children[0].node)
        del self._nodes[filter_node.name]
        # Its own edge stands in nobody's way from now on.
        filter_node.children[0].writable = False
        filter_node.children[0].shares_write = True
        filter_node.children[0].role = SNAPSHOT_ROLE
        task = eager.start(self._drop_bypassed(filter_node))
        return None if task is None else self._keep(task)

    async def _drop_bypassed(self, filter_node: Node) -> None:
        for edge in filter_node.children:
            edge.close_gate()
            await self._let_go(edge)
        filter_node.children = ()
        self._edges.pop(filter_node, None)
        await filter_node.close()

    def _move(self, edges: Iterable[Edge], node: Node) -> None:
        for edge in list(edges):
            self._edges[edge.node].remove(edge)
            edge.node = node
            self._edges[node].append(edge)

    def _uppermost(self, edges: list[Edge]) -> list[Edge]:
        """Those of `edges` that serve no requests of the others."""
        if len(edges) < 2:
            return edges
        below = set[int]().union(*(self._subtree_edges(node) for node in {edge.node for edge in edges}))
        return [edge for edge in edges if id(edge) not in below]

    def _subtree_edges(self, top: Node) -> set[int]:
        found: set[int] = set()
        heap = [top]
        while heap:
            for edge in heap.pop().children:
                if id(edge) not in found:
                    found.add(id(edge))
                    heap.append(edge.node)
        return found


def _check_permissions(node: Node, edge: Edge, others: Iterable[Edge]) -> None:
    for other in others:
        for writer, holder in ((edge, other), (other, edge)):
            if writer.writable and not holder.shares_write:
                raise PermissionConflict(
                    f"{edge} cannot have node {quoted(node.name)}: {writer} writes to it, "
                    f"and {holder} does not share that"
                )


async def _all_idle(edges: Collection[Edge], deadline: float, timeout_s: float) -> None:
    busy = [edge for edge in edges if edge.busy]
    if not busy:
        return
    try:
        async with asyncio.timeout_at(deadline):
            for edge in busy:
                await edge.idle()
    except TimeoutError:
        late = next((edge for edge in busy if edge.busy), busy[0])
        raise IoError(
            errno.ETIMEDOUT,
            late.node.name,
            "drain",
            detail=f"{late.busy} requests of {late} did not end in {timeout_s:g} s",
        ) from None
