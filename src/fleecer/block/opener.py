"""Making nodes out of options: files and devices are opened, headers read, backing chains followed.

Invariants:
- Formats are never probed: a guest can write any header into its disk. A raw file stays raw.
- A name from a header is opened only where `resolve_backing` allows it, with the format that the header records, for
  reading; a chain is no longer than `CHAIN_MAX`, and no file is in it twice.
- What fails leaves no node, descriptor or lock behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from fleecer.block import options as opt
from fleecer.block.copier import CLUSTER_SIZE_BYTES, Copier
from fleecer.block.edge import Edge
from fleecer.block.fleecing import check_scratch
from fleecer.block.graph import FILTER_ROLE, SNAPSHOT_ROLE, Graph
from fleecer.block.node import Node
from fleecer.block.nodes.copy_before_write import CopyBeforeWriteNode
from fleecer.block.nodes.delay import DelayNode
from fleecer.block.nodes.fault import FaultNode, Operation
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.filter import FilterNode
from fleecer.block.nodes.log import LogNode
from fleecer.block.nodes.nbd import NbdNode
from fleecer.block.nodes.null import NullNode
from fleecer.block.nodes.qcow2 import open_qcow2, read_header
from fleecer.block.nodes.raw import RawNode
from fleecer.block.nodes.snapshot_access import SnapshotAccessNode
from fleecer.block.nodes.throttle import ThrottleNode
from fleecer.errors import (
    CannotOpen,
    CorruptImage,
    FleecerError,
    GraphError,
    PermissionConflict,
    UnsupportedFormat,
    UsageError,
    quoted,
)
from fleecer.net.listen import parse_port
from fleecer.net.nbd_client import NbdClient
from fleecer.net.stream import connect_tcp, connect_unix
from fleecer.storage.file import open_file
from fleecer.storage.paths import file_identity, resolve_backing

if TYPE_CHECKING:
    from fleecer.formats.qcow2.header import Header

CHAIN_MAX = 64


class Opener:
    """Opens nodes into `graph`. `allow_backing`: directories for backing files that headers name, beside their own."""

    def __init__(self, graph: Graph, *, allow_backing: Sequence[str] = ()) -> None:
        self._graph = graph
        self._allow_backing = tuple(allow_backing)

    async def add(self, options: opt.BlockdevOptions) -> Node:
        """A node with a name of its own, kept until `Graph.remove`. Raises UsageError for none, or a taken one."""
        if options.node_name is None:
            raise UsageError("block device options: node-name is missing; give the node a name")
        if not options.node_name or options.node_name.startswith("#"):
            raise UsageError(f"node name {quoted(options.node_name)} must not be empty, nor begin with '#'")
        return await self._open(options, named=True, chain=())

    async def _open(self, options: opt.BlockdevOptions, *, named: bool, chain: tuple[tuple[int, int], ...]) -> Node:
        name = options.node_name or self._graph.fresh_name()
        self._graph.claim_name(name)
        async with self._undone_on_error() as edges:
            node = await self._make(name, options, edges, chain)
            if options.discard == "ignore":
                node.limits = dataclasses.replace(node.limits, can_discard=False)
            try:
                self._graph.add(node, named=named)  # the name may have been taken while the image was opened
            except FleecerError:
                await node.close()
                raise
        return node

    @contextlib.asynccontextmanager
    async def _undone_on_error(self) -> AsyncIterator[list[Edge]]:
        edges: list[Edge] = []
        try:
            yield edges
        except BaseException:
            for edge in reversed(edges):
                await self._graph.detach(edge)
            raise

    async def _make(
        self, name: str, options: opt.BlockdevOptions, edges: list[Edge], chain: tuple[tuple[int, int], ...]
    ) -> Node:
        match options:
            case opt.FileOptions():
                return await self._file(name, options)
            case opt.NullOptions():
                return NullNode(name, options.size, read_zeroes=options.read_zeroes)
            case opt.NbdOptions():
                return NbdNode(name, await _connect(options), read_only=options.read_only)
            case opt.Qcow2Options():
                return await self._qcow2(name, options, edges, chain)
            case opt.CopyBeforeWriteOptions():
                return await self._copy_before_write(name, options, edges)
            case opt.SnapshotAccessOptions():
                return await self._snapshot_access(name, options, edges)
        writable = not options.read_only
        # Growth is the say of whoever holds the filter: a qcow2 node's file may be reached through one.
        child = await self._child(name, "file", options.file, edges, writable=writable, may_grow=writable)
        match options:
            case opt.ThrottleOptions():
                return ThrottleNode(
                    name,
                    child,
                    bytes_per_second=options.bps_total or None,
                    requests_per_second=options.iops_total or None,
                )
            case opt.DelayOptions():
                return DelayNode(name, child, _delays(options))
            case opt.LogOptions():
                return LogNode(name, child)
            case opt.FaultOptions():
                return _fault(name, child, options)
        return RawNode(name, child)

    async def _child(
        self,
        parent: str,
        role: str,
        child: opt.Child,
        edges: list[Edge],
        *,
        writable: bool,
        shares_write: bool = True,
        may_grow: bool = False,
        chain: tuple[tuple[int, int], ...] = (),
    ) -> Edge:
        """An edge to an existing node, or to one made for it; noted in `edges`.

        A node made for its parent goes with it, and is opened for writing exactly if the parent writes to it.
        """
        if isinstance(child, str):
            node = self._graph.find(child)
        else:
            if not writable and not child.read_only:
                child = msgspec.structs.replace(child, read_only=True)
            node = await self._open(child, named=False, chain=chain)
        label = f"node {quoted(parent)}"
        try:
            edge = self._graph.attach(
                node, label, role, writable=writable, shares_write=shares_write, may_grow=may_grow
            )
        except GraphError:
            if not isinstance(child, str):
                await self._graph.discard_unused(node)
            raise
        edges.append(edge)
        return edge

    async def _qcow2(
        self, name: str, options: opt.Qcow2Options, edges: list[Edge], chain: tuple[tuple[int, int], ...]
    ) -> Node:
        writable = not options.read_only
        file = await self._child(
            name, "file", options.file, edges, writable=writable, shares_write=False, may_grow=writable
        )
        _check_growth(name, file)
        path = _image_name(file.node)
        header = await read_header(file, path)
        backing = options.backing
        if backing is msgspec.UNSET and header.backing_file is not None:
            backing, chain = self._named_backing(name, file, header, chain)
        edge = None
        if backing is not None and backing is not msgspec.UNSET:
            try:
                edge = await self._child(name, "backing", backing, edges, writable=False, chain=chain)
            except CannotOpen as error:
                if options.backing is not msgspec.UNSET or error.needed_by:
                    raise
                raise CannotOpen(error.errno, error.node, error.why, needed_by=path) from error
        return await open_qcow2(
            file,
            name=name,
            header=header,
            backing=edge,
            read_only=options.read_only,
            path=path,
            discard_freed=options.discard == "unmap",
        )

    def _named_backing(
        self, name: str, file: Edge, header: Header, chain: tuple[tuple[int, int], ...]
    ) -> tuple[opt.BlockdevOptions, tuple[tuple[int, int], ...]]:
        """Options for the backing file that a header names, and the files of the chain so far."""
        image = file.node
        named, recorded = header.backing_file or "", header.backing_format
        if not isinstance(image, FileNode):
            raise UnsupportedFormat(
                name, f"it names the backing file {quoted(named)}, but is no local file; give backing"
            )
        path = image.storage.name
        chain = (*chain, image.storage.identity)
        if len(chain) >= CHAIN_MAX:
            raise UnsupportedFormat(path, f"its backing chain is longer than {CHAIN_MAX} images, which is the limit")
        if recorded is None:
            problem = f"its backing file {quoted(named)} has no recorded format, and guessing is not safe"
            hint = f"record it with: qemu-img rebase -u -b {quoted(named)} -F FORMAT {quoted(path)}"
            raise UnsupportedFormat(path, f"{problem}; {hint}")
        found = resolve_backing(path, named, self._allow_backing)
        if file_identity(found) in chain:
            raise CorruptImage(
                path, f"its backing file {quoted(named)} is an image above it in the chain; that is a loop"
            )
        file_options = opt.FileOptions(filename=found, read_only=True)
        if recorded == "qcow2":
            return opt.Qcow2Options(file=file_options, read_only=True), chain
        if recorded == "raw":
            return opt.RawOptions(file=file_options, read_only=True), chain
        raise UnsupportedFormat(
            path, f"its backing file {quoted(named)} has format {quoted(recorded)}; raw and qcow2 are known"
        )

    async def _file(self, name: str, options: opt.FileOptions) -> FileNode:
        try:
            storage = await open_file(options.filename, read_only=options.read_only, locking=options.locking != "off")
        except PermissionConflict:
            holder = self._holder(file_identity(options.filename))
            if holder is None:
                raise
            raise PermissionConflict(
                f"image {quoted(options.filename)} is open in this daemon already, as node {quoted(holder)}; "
                "use that node, or close it first"
            ) from None
        try:
            return FileNode(name, storage)
        except FleecerError:
            await storage.close()
            raise

    def _holder(self, identity: tuple[int, int] | None) -> str | None:
        """The node that has a file open, by the nearest name above that a user gave; None if none has."""
        nodes = self._graph.nodes()
        node: Node | None = next((n for n in nodes if isinstance(n, FileNode) and n.storage.identity == identity), None)
        while node is not None and node.name.startswith("#"):
            below = node
            node = next((n for n in nodes if any(edge.node is below for edge in n.children)), None)
        return None if node is None else node.name

    async def _copy_before_write(self, name: str, options: opt.CopyBeforeWriteOptions, edges: list[Edge]) -> Node:
        source = await self._child(name, FILTER_ROLE, options.file, edges, writable=True, shares_write=False)
        scratch = await self._child(name, "target", options.target, edges, writable=True, shares_write=False)
        check_scratch(source.node, scratch.node)
        copier = Copier(
            source,
            cluster_size_bytes=max(
                CLUSTER_SIZE_BYTES, options.min_cluster_size, scratch.node.limits.cluster_size_bytes
            ),
            on_error=options.on_cbw_error,
            timeout_s=options.cbw_timeout,
        )
        # No request passes a filter that is still being made: this is the instant.
        copier.take(name, scratch, serialising=self._graph.reaches(scratch.node, source.node))
        node = CopyBeforeWriteNode(name, copier)
        node.follow_scratches()
        return node

    async def _snapshot_access(self, name: str, options: opt.SnapshotAccessOptions, edges: list[Edge]) -> Node:
        edge = await self._child(name, SNAPSHOT_ROLE, options.file, edges, writable=False)
        below = edge.node
        if not isinstance(below, CopyBeforeWriteNode) or not below.copier.snapshots:
            raise UsageError(f"node {quoted(below.name)} is no copy-before-write filter with a snapshot")
        return SnapshotAccessNode(
            name, edge, below.copier, below.copier.snapshots[-1], may_discard=not options.read_only
        )


def _check_growth(name: str, file: Edge) -> None:
    """Raises PermissionConflict where a format is to grow its file through a filter that keeps the file's past."""
    node = file.node
    while file.may_grow and node.limits.growable and isinstance(node, FilterNode):
        if isinstance(node, CopyBeforeWriteNode):
            raise PermissionConflict(
                f"node {quoted(name)} makes its file grow, and copy-before-write node {quoted(node.name)} keeps the "
                "past of one that does not; put that filter above this node, or open this one read-only"
            )
        node = node.child.node


def _image_name(node: Node) -> str:
    """What the user calls the image in a protocol node."""
    return node.storage.name if isinstance(node, FileNode) else node.name


async def _connect(options: opt.NbdOptions) -> NbdClient:
    server = options.server
    if isinstance(server, opt.UnixAddress):
        stream = await connect_unix(server.path)
    else:
        stream = await connect_tcp(server.host, parse_port(server.port))
    return await NbdClient.connect(stream, options.export)


def _delays(options: opt.DelayOptions) -> dict[Operation, float]:
    return {
        "read": options.read_s,
        "block status": options.read_s,
        "write": options.write_s,
        "write zeroes": options.write_s,
        "discard": options.write_s,
        "flush": options.flush_s,
    }


def _fault(name: str, child: Edge, options: opt.FaultOptions) -> FaultNode:
    node = FaultNode(name, child)
    for rule in options.rules:
        node.fail(
            rule.operation,
            rule.offset,
            rule.length or None,
            errno=rule.errno,
            after=rule.after,
            times=rule.times or None,
        )
    return node
