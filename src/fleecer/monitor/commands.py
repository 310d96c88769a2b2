"""The QMP commands. QEMU's own names, arguments and results where it has the verb; Fleecer's own for snapshots.

Each function's signature is the command's schema (registry.py), its docstring its help. Optional arguments that QEMU
has and we do not are refused by name, so that nobody relies on what does not happen.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import msgspec

from fleecer import __version__
from fleecer.block import options as opt
from fleecer.block.copier import TIMEOUT_S, OnError
from fleecer.block.fleecing import CUT_TIMEOUT_S
from fleecer.block.node import Node
from fleecer.block.nodes.file import FileNode
from fleecer.block.nodes.qcow2 import Qcow2Node
from fleecer.daemon import Daemon, SnapshotPart, SnapshotSet
from fleecer.errors import UsageError, quoted
from fleecer.export import Export
from fleecer.jobs import BackupRequest, Job
from fleecer.monitor.registry import COMMANDS, Context, command
from fleecer.net.listen import parse_port

Result = dict[str, Any]
Seconds = opt.Seconds


class _Kebab(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """Base of argument structures."""


# The monitor itself.


def version() -> Result:
    """The version in QMP's form. `package` tells that this is not QEMU."""
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in (*__version__.split("."), "0", "0")[:3]]
    major, minor, micro = numbers
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"fleecer-{__version__}"}


@command
async def query_version(context: Context) -> Result:
    """The version of Fleecer."""
    return version()


@command
async def query_commands(context: Context) -> list[Result]:
    """Every command there is."""
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


@command
async def quit_(context: Context) -> Result:
    """Ends the daemon in order: requests in flight end, everything is flushed."""
    context.quit()
    return {}


# Nodes.


@command
async def blockdev_add(context: Context, options: opt.BlockdevOptions, /) -> Result:
    """Opens a node."""
    await context.daemon.opener.add(options)
    return {}


@command
async def blockdev_del(context: Context, node_name: str) -> Result:
    """Closes a node that nothing uses."""
    await context.daemon.graph.remove(node_name)
    return {}


@command
async def query_named_block_nodes(context: Context, flat: bool = False) -> list[Result]:
    """Every node, those without a name of their own included."""
    return [_describe_node(node) for node in context.daemon.graph.nodes()]


def _describe_node(node: Node) -> Result:
    filename = _file_name(node)
    backing = next((edge.node.name for edge in node.children if edge.role == "backing"), None)
    described: Result = {
        "node-name": node.name,
        "drv": node.driver,
        "ro": node.read_only,
        "file": filename,
        "backing_file_depth": _backing_depth(node),
        "encrypted": False,
        "detect_zeroes": "off",
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "image": {"filename": filename, "format": node.driver, "virtual-size": node.size},
        "children": [{"node-name": edge.node.name, "child": edge.role} for edge in node.children],
    }
    if backing is not None:
        described["backing-node-name"] = backing
    if isinstance(node, Qcow2Node):
        described["image"]["format-specific"] = {"type": "qcow2", "data": node.describe()}
    return described


def _file_name(node: Node) -> str:
    """The file at the bottom of a node's first children; "" where there is none."""
    while node.children:
        node = node.children[0].node
    return _told_path(node.storage.name) if isinstance(node, FileNode) else ""


def _told_path(path: str) -> str:
    """A path for JSON, which has no place for bytes that are not UTF-8: those are shown escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _backing_depth(node: Node) -> int:
    depth = 0
    while backing := next((edge.node for edge in node.children if edge.role == "backing"), None):
        node, depth = backing, depth + 1
    return depth


# Exports.


class UnixListen(_Kebab):
    """Where a unix socket goes."""

    path: str


class InetListen(_Kebab):
    """A TCP address; the port is a string, as in QEMU."""

    host: str
    port: str


class UnixListenAddress(msgspec.Struct, tag_field="type", tag="unix", forbid_unknown_fields=True):
    """QEMU's legacy form: {"type": "unix", "data": {"path": ...}}."""

    data: UnixListen


class InetListenAddress(msgspec.Struct, tag_field="type", tag="inet", forbid_unknown_fields=True):
    """QEMU's legacy form: {"type": "inet", "data": {"host": ..., "port": ...}}."""

    data: InetListen


@command
async def nbd_server_start(
    context: Context,
    addr: UnixListenAddress | InetListenAddress,
    max_connections: Annotated[int, msgspec.Meta(ge=0)] = 100,
) -> Result:
    """Starts to serve NBD at an address. A daemon may serve at several."""
    server = context.daemon.server
    if isinstance(addr, UnixListenAddress):
        server.listen_unix(addr.data.path)
    else:
        server.listen_tcp(addr.data.host, parse_port(addr.data.port))
    if max_connections:
        server.connections_max = max_connections
    return {}


@command
async def nbd_server_stop(context: Context) -> Result:
    """Stops serving NBD and removes every export; requests in flight end first."""
    daemon = context.daemon
    if not daemon.server.listeners:
        raise UsageError("NBD server not running")
    await daemon.server.stop()
    for export in daemon.disks():
        await daemon.remove_export(export.export_id, hard=True)
    return {}


@command
async def block_export_add(
    context: Context,
    type: Literal["nbd"],
    id: str,
    node_name: str,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
    writethrough: bool = False,
) -> Result:
    """Exports a node over NBD. Without `name` the export has the node's."""
    daemon = context.daemon
    if writethrough:
        raise UsageError("block-export-add: writethrough is not supported; a client can ask for FUA or flush")
    if not daemon.server.listeners:
        raise UsageError("NBD server not running; use nbd-server-start first")
    daemon.export(
        daemon.graph.find(node_name), name or node_name, export_id=id, writable=writable, description=description
    )
    return {}


@command
async def block_export_del(
    context: Context,
    id: str,
    mode: Literal["safe", "hard"] = "safe",
) -> Result:
    """Removes an export. "safe" fails while clients are connected, "hard" disconnects them."""
    await context.daemon.remove_export(id, hard=mode == "hard")
    return {}


@command
async def query_block_exports(context: Context) -> list[Result]:
    """Every export."""
    return [
        {"id": export.export_id, "type": "nbd", "node-name": export.edge.node.name, "shutting-down": False}
        for export in context.daemon.server.exports()
    ]


# Jobs.


class BlockdevBackup(_Kebab):
    """QEMU's BlockdevBackup, as far as it goes."""

    device: str
    target: str
    sync: Literal["none", "full"]
    job_id: str | None = None
    filter_node_name: str | None = None
    on_cbw_error: OnError = "break-snapshot"
    cbw_timeout: Seconds = TIMEOUT_S
    auto_finalize: Literal[True] = True
    auto_dismiss: bool = True


def _backup_request(daemon: Daemon, options: BlockdevBackup) -> BackupRequest:
    device, target = daemon.graph.find(options.device), daemon.graph.find(options.target)
    return BackupRequest(
        options.job_id or options.device,
        device,
        target,
        options.sync,
        filter_name=options.filter_node_name,
        on_error=options.on_cbw_error,
        timeout_s=options.cbw_timeout,
        auto_dismiss=options.auto_dismiss,
    )


async def _start(context: Context, options: list[BlockdevBackup]) -> None:
    daemon = context.daemon
    await daemon.start_backups([_backup_request(daemon, one) for one in options])


@command
async def blockdev_backup(context: Context, options: BlockdevBackup, /) -> Result:
    """Starts to copy the disk `device`, as it is at this instant, to the node `target`."""
    await _start(context, [options])
    return {}


class BackupAction(msgspec.Struct, tag_field="type", tag="blockdev-backup", forbid_unknown_fields=True):
    """A blockdev-backup in a transaction."""

    data: BlockdevBackup


class TransactionProperties(_Kebab):
    """How the actions' jobs hang together once started: each for itself."""

    completion_mode: Literal["individual"] = "individual"


@command
async def transaction(
    context: Context, actions: list[BackupAction], properties: TransactionProperties | None = None
) -> Result:
    """Starts several backups of one instant, or none of them."""
    await _start(context, [action.data for action in actions])
    return {}


@command
async def query_jobs(context: Context) -> list[Result]:
    """Every job that has not been dismissed."""
    return [_describe_job(job) for job in context.daemon.jobs.jobs()]


def _describe_job(job: Job) -> Result:
    described: Result = {
        "id": job.job_id,
        "type": job.kind,
        "status": job.state,
        "current-progress": job.progress_current,
        "total-progress": job.progress_total,
    }
    return described | ({"error": job.error} if job.error else {})


@command
async def job_cancel(context: Context, id: str) -> Result:
    """Ends a job early. It concludes, and then goes by itself unless it was started with auto-dismiss false."""
    await context.daemon.jobs.find(id).cancel()
    return {}


@command
async def job_dismiss(context: Context, id: str) -> Result:
    """Forgets a job that has concluded."""
    context.daemon.jobs.dismiss(id)
    return {}


# Fleecer's own: snapshots and disks.


@command
async def snapshot_create(
    context: Context,
    disks: list[str] | None = None,
    name: str | None = None,
    scratch_dir: str | None = None,
    on_cbw_error: OnError = "break-snapshot",
    cbw_timeout: Seconds = TIMEOUT_S,
    drain_timeout: Seconds = CUT_TIMEOUT_S,
    cluster_size: int | None = None,
    temporary: bool = False,
) -> Result:
    """Cuts disks (default: all) at one instant. With `temporary` it goes when this client's connection does.

    `cbw_timeout` 0 lets a write wait for a copy without bound.
    """
    daemon = context.daemon
    taken = await daemon.snapshots.create(
        disks or (),
        name=name,
        scratch_directory=scratch_dir,
        on_error=on_cbw_error,
        copy_timeout_s=cbw_timeout,
        drain_timeout_s=drain_timeout,
        cluster_size_bytes=cluster_size,
    )
    if temporary:

        async def drop() -> None:
            if taken in daemon.snapshots.sets():
                await daemon.snapshots.delete(taken.name)

        context.at_end[taken.name] = drop
    return _describe_snapshot(context, taken)


@command
async def snapshot_keep(context: Context, name: str) -> Result:
    """Lets a snapshot that this client made as a temporary one outlive its connection."""
    context.daemon.snapshots.find(name)
    if context.at_end.pop(name, None) is None:
        raise UsageError(f"snapshot {quoted(name)} is no temporary one of this connection, so there is nothing to keep")
    return {}


@command
async def snapshot_delete(context: Context, name: str) -> Result:
    """Ends a snapshot; its readers are disconnected once their requests in flight have ended."""
    await context.daemon.snapshots.delete(name)
    return {}


@command
async def query_snapshots(context: Context) -> list[Result]:
    """Every snapshot, oldest first."""
    return [_describe_snapshot(context, taken) for taken in context.daemon.snapshots.sets()]


def _describe_snapshot(context: Context, taken: SnapshotSet) -> Result:
    return {
        "name": taken.name,
        "created": taken.created.isoformat(timespec="milliseconds"),
        "disks": [_describe_part(part, len(context.daemon.server.clients(part.export))) for part in taken.parts],
    }


def _describe_part(part: SnapshotPart, clients: int) -> Result:
    described: Result = {
        "name": part.disk,
        "export": part.export.name,
        "size": part.size,
        "bytes-preserved": part.bytes_preserved,
        "clients": clients,
        "state": "broken" if part.cause else "active",
    }
    return described | ({"cause": part.cause} if part.cause else {})


@command
async def query_disks(context: Context) -> list[Result]:
    """Every disk that is served, with what its clients have done so far, and a `problem` where there is one."""
    daemon = context.daemon
    return [_describe_disk(daemon, export) for export in daemon.disks()]


def _describe_disk(daemon: Daemon, export: Export) -> Result:
    node = export.edge.node
    while node.driver in ("copy-before-write", "raw") and node.children:
        node = node.children[0].node
    described: Result = {
        "name": export.name,
        "size": export.edge.size,
        "format": "raw" if node.driver == "file" else node.driver,
        "file": os.path.abspath(_file_name(node)) if _file_name(node) else "",
        "writable": export.edge.writable,
        "clients": len(daemon.server.clients(export)),
        "reads": export.reads,
        "writes": export.writes,
        "bytes-read": export.bytes_read,
        "bytes-written": export.bytes_written,
    }
    problem = daemon.problems.of(export)
    return described | ({"problem": problem} if problem else {})


@command
async def query_nbd_server(context: Context) -> list[Result]:
    """Where NBD is served."""
    addresses: list[Result] = []
    for listener in context.daemon.server.listeners:
        address = listener.address
        if isinstance(address, str):
            addresses.append({"type": "unix", "path": _told_path(listener.name)})
        else:
            addresses.append({"type": "inet", "host": address[0], "port": str(address[1])})
    return addresses
