"""The graph: who holds what, and changing it under running requests."""

from __future__ import annotations

import asyncio
import errno
import functools
import random

import pytest
from tests.serving_world import turns

from fleecer.block.copier import Copier
from fleecer.block.edge import Edge
from fleecer.block.graph import FILTER_ROLE, Graph
from fleecer.block.node import Node
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.fault import FaultNode
from fleecer.block.nodes.raw import RawNode
from fleecer.errors import InUse, IoError, NotFound, PermissionConflict, UsageError
from fleecer.testing.memory import MemoryNode, random_turns
from fleecer.units import KiB

SIZE = 64 * KiB


class ClosingNode(MemoryNode):
    """Notes when it is closed, in a list shared with others."""

    def __init__(self, name: str, closed: list[str], failure: IoError | None = None) -> None:
        super().__init__(name, SIZE)
        self.closed = closed
        self.failure = failure

    async def close(self) -> None:
        self.closed.append(self.name)
        if self.failure is not None:
            raise self.failure


def added(graph: Graph, node: Node, *, named: bool = True) -> Node:
    graph.add(node, named=named)
    return node


def faulty_disk(graph: Graph) -> FaultNode:
    """A fault node "disk" over memory."""
    memory = added(graph, MemoryNode("memory", random.Random(1).randbytes(SIZE)))
    node = FaultNode("disk", graph.attach(memory, "node 'disk'", "file", writable=True))
    graph.add(node, named=True)
    return node


def raw_over(graph: Graph, name: str, node: Node, *, writable: bool = True, named: bool = True) -> RawNode:
    top = RawNode(name, graph.attach(node, f"node '{name}'", "file", writable=writable))
    graph.add(top, named=named)
    return top


# Nodes and edges.


async def test_names_are_unique_and_told_when_missing() -> None:
    graph = Graph()
    node = added(graph, MemoryNode("disk", SIZE))
    assert graph.find("disk") is node
    assert graph.nodes() == [node]
    with pytest.raises(UsageError, match=r"^node name 'disk' is taken; choose another$"):
        graph.add(MemoryNode("disk", SIZE), named=True)
    with pytest.raises(NotFound, match=r"^node 'disc' does not exist$"):
        graph.find("disc")
    assert graph.fresh_name() != graph.fresh_name()


async def test_the_number_of_nodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleecer.block.graph.NODES_MAX", 2)
    graph = Graph()
    added(graph, MemoryNode("one", SIZE))
    added(graph, MemoryNode("two", SIZE))
    with pytest.raises(UsageError, match=r"^there are 2 nodes, which is the limit$"):
        graph.add(MemoryNode("three", SIZE), named=True)


async def test_a_node_is_removed_only_when_nothing_leads_to_it() -> None:
    graph, closed = Graph(), list[str]()
    node = added(graph, ClosingNode("disk", closed))
    edge = graph.attach(node, "export 'web'", "nbd")
    with pytest.raises(InUse, match=r"^node 'disk' is in use by export 'web' \(nbd\); remove that first$"):
        await graph.remove("disk")
    await graph.detach(edge)
    await graph.detach(edge)
    assert not closed, "a named node stays without edges"
    await graph.remove("disk")
    assert closed == ["disk"]
    with pytest.raises(NotFound):
        await graph.remove("disk")


async def test_parents_are_closed_before_their_children_whatever_else_leads_to_them() -> None:
    graph, closed = Graph(), list[str]()
    child = added(graph, ClosingNode("child", closed))
    parent = added(graph, ClosingNode("parent", closed))
    parent.children = (graph.attach(child, "node 'parent'", "file"),)
    graph.attach(child, "export 'a'", "nbd")
    graph.attach(parent, "export 'b'", "nbd")
    await graph.close()
    assert closed == ["parent", "child"]


async def test_an_unnamed_node_goes_with_its_last_edge() -> None:
    graph, closed = Graph(), list[str]()
    node = added(graph, ClosingNode("#block1", closed), named=False)
    first, second = graph.attach(node, "a", "file"), graph.attach(node, "b", "file")
    with pytest.raises(InUse, match=r"^node '#block1' belongs to a \(file\) and goes with it$"):
        await graph.remove("#block1")
    await graph.detach(first)
    assert not closed
    await graph.detach(second)
    assert closed == ["#block1"]
    assert not graph.nodes()


async def test_closing_a_node_gives_back_its_children() -> None:
    graph, closed = Graph(), list[str]()
    below = added(graph, ClosingNode("#file", closed), named=False)
    raw_over(graph, "top", below)
    await graph.remove("top")
    assert closed == ["#file"]
    assert not graph.nodes()


async def test_closing_a_node_waits_for_what_it_has_in_flight_below() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    top = raw_over(graph, "top", disk)
    held = disk.hold("read")
    reading = asyncio.ensure_future(top.child.pread(0, 512))  # a background request of the node itself
    await held.reached()
    removing = asyncio.ensure_future(graph.remove("top"))
    await turns()
    assert not removing.done()
    held.release()
    await reading
    await removing


async def test_closing_the_graph_closes_parents_first_and_all_in_spite_of_failures() -> None:
    graph, closed = Graph(), list[str]()
    failure = IoError(errno.ENOSPC, "top", "flush")
    file = added(graph, ClosingNode("file", closed))
    middle = ClosingNode("middle", closed, failure)
    middle.children = (graph.attach(file, "node 'middle'", "file", writable=True),)
    graph.add(middle, named=True)
    top = ClosingNode("top", closed)
    top.children = (graph.attach(middle, "node 'top'", "file", writable=True),)
    graph.add(top, named=True)
    with pytest.raises(IoError) as caught:
        await graph.close()
    assert caught.value is failure
    assert closed == ["top", "middle", "file"]
    assert not graph.nodes()


async def test_writers_and_those_who_do_not_share_exclude_each_other() -> None:
    graph = Graph()
    node = added(graph, MemoryNode("disk", SIZE))
    graph.attach(node, "export 'a'", "nbd", writable=True)
    graph.attach(node, "export 'b'", "nbd", writable=True)
    text = (
        r"^node 'image' \(file\) cannot have node 'disk': export 'a' \(nbd\) writes to it, "
        r"and node 'image' \(file\) does not share that$"
    )
    with pytest.raises(PermissionConflict, match=text):
        graph.attach(node, "node 'image'", "file", shares_write=False)
    assert len(graph.parents(node)) == 2
    other = added(graph, MemoryNode("other", SIZE))
    graph.attach(other, "node 'image'", "file", writable=True, shares_write=False)
    graph.attach(other, "export 'r'", "nbd")
    with pytest.raises(PermissionConflict, match="export 'w'"):
        graph.attach(other, "export 'w'", "nbd", writable=True)


async def test_who_does_not_share_writing_does_not_share_what_the_node_is_made_of_either() -> None:
    graph = Graph()
    bottom = added(graph, MemoryNode("bottom", SIZE))
    middle = raw_over(graph, "middle", bottom)
    top = raw_over(graph, "top", middle)
    writer = graph.attach(bottom, "export 'w'", "nbd", writable=True)
    text = r"export 'w' \(nbd\) writes to it, and job \(target\) does not share that$"
    with pytest.raises(PermissionConflict, match=text):
        graph.attach(top, "job", "target", writable=True, shares_write=False)
    await graph.detach(writer)
    only = graph.attach(top, "job", "target", writable=True, shares_write=False)
    with pytest.raises(PermissionConflict, match=text):
        graph.attach(bottom, "export 'w'", "nbd", writable=True)
    graph.attach(bottom, "export 'r'", "nbd")
    await graph.detach(only)
    graph.attach(bottom, "export 'w'", "nbd", writable=True)


async def test_a_backing_node_is_another_disk() -> None:
    graph = Graph()
    backing = added(graph, MemoryNode("backing", SIZE))
    overlay = raw_over(graph, "overlay", added(graph, MemoryNode("file", SIZE)))
    overlay.children += (graph.attach(backing, "node 'overlay'", "backing"),)
    graph.attach(overlay, "job", "target", writable=True, shares_write=False)
    graph.attach(backing, "export 'live'", "nbd", writable=True)


async def test_nobody_gets_a_writable_edge_to_a_read_only_node() -> None:
    graph = Graph()
    node = added(graph, MemoryNode("disk", SIZE, read_only=True))
    with pytest.raises(PermissionConflict, match=r"^export 'a' \(nbd\) wants to write to node 'disk', which is read-o"):
        graph.attach(node, "export 'a'", "nbd", writable=True)
    assert not graph.parents(node)


async def test_reaching_goes_through_every_child() -> None:
    graph = Graph()
    bottom = added(graph, MemoryNode("bottom", SIZE))
    middle = raw_over(graph, "middle", bottom)
    top = raw_over(graph, "top", middle)
    beside = raw_over(graph, "beside", bottom, writable=False)
    assert graph.reaches(top, bottom)
    assert graph.reaches(top, top)
    assert not graph.reaches(bottom, top)
    assert not graph.reaches(top, beside)


# Drain.


async def test_inside_a_drain_nothing_is_in_flight_and_afterwards_all_goes_on() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    edges = [graph.attach(disk, f"export '{name}'", "nbd", writable=True) for name in "ab"]
    held = disk.hold("write", 0, 512)
    early = asyncio.ensure_future(edges[0].pwrite(0, b"e" * 512))
    await held.reached()
    entered, leave = asyncio.Event(), asyncio.Event()

    async def drain() -> None:
        async with graph.drained(lambda: edges):
            assert not any(edge.busy for edge in edges)
            entered.set()
            await leave.wait()

    draining = asyncio.ensure_future(drain())
    await turns()
    late = [asyncio.ensure_future(edge.pread(0, 512)) for edge in edges]
    await turns()
    assert not entered.is_set()
    held.release()
    await entered.wait()
    assert early.done()
    await turns()
    assert not any(request.done() for request in late)
    leave.set()
    await draining
    assert [bytes(await request) for request in late] == [b"e" * 512] * 2


async def test_a_drain_that_takes_too_long_names_who_is_late_and_lets_all_go_on() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    edges = [graph.attach(disk, f"export '{name}'", "nbd", writable=True) for name in "ab"]
    held = disk.hold("write")
    writing = asyncio.ensure_future(edges[1].pwrite(0, b"x"))
    await held.reached()
    text = r"^drain on 'disk': 1 requests of export 'b' \(nbd\) did not end in 0\.01 s$"
    with pytest.raises(IoError, match=text) as caught:
        async with graph.drained(lambda: edges, timeout_s=0.01):
            raise AssertionError("not reached")
    assert caught.value.errno == errno.ETIMEDOUT
    assert await edges[0].pread(1000, 10)
    held.release()
    await writing
    await edges[1].pwrite(0, b"y")
    async with graph.drained(lambda: edges, timeout_s=1):
        pass


async def test_drains_wait_for_one_another_without_holding_a_gate() -> None:
    graph = Graph()
    one, other = faulty_disk(graph), added(graph, MemoryNode("other", SIZE))
    a, b = graph.attach(one, "a", "nbd"), graph.attach(other, "b", "nbd")
    inside: list[str] = []

    async def drain(name: str, edges: list[Edge]) -> None:
        async with graph.drained(lambda: edges):
            inside.append(name)
            await turns()
            assert inside[-1] == name, "two drains at once"
            if name == "first":
                assert await b.pread(0, 512)  # the second, which waits, has closed no gate

    await asyncio.gather(drain("first", [a]), drain("second", [b, a]))
    assert inside == ["first", "second"]


class TwoSteps(RawNode):
    """Its read makes two of its child, the second once the first has ended."""

    async def pread(self, offset: int, length: int) -> bytes:
        first = bytes(await self.child.pread(offset, length))
        assert first == await self.child.pread(offset, length)
        return first


async def test_edges_of_which_one_serves_the_others_requests_can_be_drained_together() -> None:
    graph = Graph()
    base = faulty_disk(graph)
    overlay = TwoSteps("overlay", graph.attach(base, "node 'overlay'", "backing"))
    graph.add(overlay, named=True)
    edges = [graph.attach(overlay, "export 'overlay'", "nbd"), graph.attach(base, "export 'base'", "nbd")]
    held = base.hold("read")
    reading = asyncio.ensure_future(edges[0].pread(0, 512))
    await held.reached()
    draining = asyncio.ensure_future(_drain(graph, [*reversed(edges), overlay.child]))
    await turns()
    held.release()
    await draining
    assert reading.done()


async def test_what_is_attached_while_a_drain_waits_is_drained_too() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    graph.attach(disk, "export 'a'", "nbd", writable=True)
    holds = [disk.hold("write"), disk.hold("write")]
    early = asyncio.ensure_future(graph.parents(disk)[0].pwrite(0, b"x"))
    await holds[0].reached()

    async def drain() -> None:
        async with graph.drained(lambda: graph.parents(disk)):
            assert len(graph.parents(disk)) == 2
            assert not any(edge.busy for edge in graph.parents(disk))

    draining = asyncio.ensure_future(drain())
    await turns()
    newcomer = graph.attach(disk, "export 'b'", "nbd", writable=True)
    late = asyncio.ensure_future(newcomer.pwrite(512, b"y"))
    await holds[1].reached()
    holds[0].release()
    await turns()
    assert not draining.done()
    holds[1].release()
    await draining
    await asyncio.gather(early, late)


async def test_an_edge_can_be_ended_while_it_is_drained_for_something_else() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    edges = [graph.attach(disk, f"export '{name}'", "nbd") for name in "ab"]
    held = disk.hold("read")
    reading = asyncio.ensure_future(edges[0].pread(0, 1))
    await held.reached()
    draining = asyncio.ensure_future(_drain(graph, edges))
    await turns()
    ending = asyncio.ensure_future(graph.drain_and_detach(edges[0]))
    waiting = asyncio.ensure_future(edges[0].pread(0, 1))
    await turns()
    held.release()
    await asyncio.gather(reading, draining, ending)
    assert graph.parents(disk) == (edges[1],)
    assert await edges[1].pread(0, 1)
    for request in (waiting, edges[0].pread(0, 1)):
        with pytest.raises(IoError, match=r"request on 'disk': export 'a' \(nbd\) has ended"):
            await request


async def _drain(graph: Graph, edges: list[Edge]) -> None:
    async with graph.drained(lambda: edges, timeout_s=2):
        assert not any(edge.busy for edge in edges)


# Filters.


def filter_over(graph: Graph, node: Node) -> tuple[CopyBeforeWriteNode, Edge]:
    source = Edge(node, "node 'filter'", FILTER_ROLE, writable=True)
    return CopyBeforeWriteNode("#filter", Copier(source)), source


async def test_a_filter_comes_and_goes_under_load() -> None:
    graph = Graph()
    pause = random_turns(3)
    disk = added(graph, MemoryNode("disk", SIZE, pause=pause))
    exports = [graph.attach(disk, f"export {at}", "nbd", writable=True) for at in range(4)]
    model = bytearray(SIZE)
    stop = False

    async def work(number: int) -> None:
        edge, generator = exports[number], random.Random(number)
        base = number * (SIZE // 4)
        while not stop:
            at, data = base + generator.randrange(SIZE // 4 - 600), generator.randbytes(600)
            await edge.pwrite(at, data)
            model[at : at + 600] = data
            assert await edge.pread(at, 600) == data

    workers = [asyncio.ensure_future(work(number)) for number in range(4)]
    for _ in range(10):
        node, source = filter_over(graph, disk)
        async with graph.drained(lambda: exports):
            graph.insert(node, source, graph.edges_to_cover(disk))
        assert all(edge.node is node for edge in exports)
        assert graph.top(disk) is node
        await turns(5)
        async with graph.drained(functools.partial(graph.parents, node)):
            closing = graph.bypass(node)
        await graph.left([closing])
        assert all(edge.node is disk for edge in exports)
    stop = True
    await asyncio.gather(*workers)
    assert await exports[0].pread(0, SIZE) == model
    assert [node.name for node in graph.nodes()] == ["disk"]


async def test_a_filter_is_refused_while_somebody_writes_past_it() -> None:
    graph = Graph()
    disk = added(graph, MemoryNode("disk", SIZE))
    inside = graph.attach(disk, "export 'a'", "nbd", writable=True)
    graph.attach(disk, "export 'b'", "nbd", writable=True)
    node, source = filter_over(graph, disk)
    with pytest.raises(PermissionConflict, match=r"export 'b' \(nbd\) writes to it"):
        graph.insert(node, source, [inside])
    assert [n.name for n in graph.nodes()] == ["disk"]
    assert len(graph.parents(disk)) == 2
    assert inside.node is disk


async def test_a_filter_is_refused_while_somebody_writes_past_it_further_down() -> None:
    graph = Graph()
    disk = added(graph, MemoryNode("disk", SIZE))
    top = raw_over(graph, "top", disk)
    guest = graph.attach(top, "export 'top'", "nbd", writable=True)
    writer = graph.attach(disk, "export 'disk'", "nbd", writable=True)
    below = Edge(top, "node 'filter'", FILTER_ROLE, writable=True)
    filter_node = CopyBeforeWriteNode("filter", Copier(below))
    with pytest.raises(PermissionConflict, match=r"export 'disk' \(nbd\) writes to it"):
        graph.insert(filter_node, below, [guest])
    assert [node.name for node in graph.nodes()] == ["disk", "top"]
    await graph.detach(writer)
    graph.insert(filter_node, below, [guest])
    assert graph.parents(filter_node) == (guest,)


async def test_what_was_bypassed_stands_in_nobodys_way_while_it_is_being_closed() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    below = Edge(disk, "node 'filter'", FILTER_ROLE, writable=True)
    filter_node = CopyBeforeWriteNode("filter", Copier(below))
    graph.insert(filter_node, below, [])
    held = disk.hold("read")
    copying = asyncio.ensure_future(below.pread(0, 512))  # a copy in the background
    await held.reached()
    closing = graph.bypass(filter_node)
    await turns()
    assert closing is not None
    assert not closing.done()
    assert graph.top(disk) is disk
    assert graph.edges_to_cover(disk) == []
    graph.attach(disk, "job", "target", writable=True, shares_write=False)
    held.release()
    await copying
    await closing


async def test_once_a_filter_stands_nobody_can_write_past_it() -> None:
    graph = Graph()
    disk = added(graph, MemoryNode("disk", SIZE))
    graph.attach(disk, "export 'a'", "nbd", writable=True)
    node, source = filter_over(graph, disk)
    graph.insert(node, source, graph.edges_to_cover(disk))
    with pytest.raises(PermissionConflict):
        graph.attach(disk, "export 'b'", "nbd", writable=True)
    graph.attach(graph.top(disk), "export 'b'", "nbd", writable=True)


async def test_an_edge_with_requests_in_flight_cannot_be_swapped() -> None:
    graph = Graph()
    disk = faulty_disk(graph)
    edge = graph.attach(disk, "export 'a'", "nbd")
    held = disk.hold("read")
    reading = asyncio.ensure_future(edge.pread(0, 1))
    await held.reached()
    with pytest.raises(AssertionError, match="swapped with 1 requests in flight"):
        edge.node = MemoryNode("other", SIZE)
    held.release()
    await reading
