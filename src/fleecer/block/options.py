"""What a node is made from: the options of `blockdev-add` and `--blockdev`, typed, with QEMU's names where it has them.

An option that is not listed is refused by name, never ignored. A child is given by the name of an existing node, or by
its own options, nested; then it belongs to its parent and goes with it, named or not.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fleecer.block.copier import TIMEOUT_S, OnError
from fleecer.block.nodes.fault import Operation
from fleecer.block.schema import explain
from fleecer.errors import UsageError

Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
SECONDS_MAX = 86400
Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]
"""A time-out, at most a day; 0 for none."""


class _Options(
    msgspec.Struct, tag_field="driver", rename="kebab", forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """Common to every driver. With `discard` "ignore" a discard that comes to the node does nothing."""

    node_name: str | None = None
    read_only: bool = False
    discard: Literal["ignore", "unmap"] = "unmap"


class FileOptions(_Options, tag="file"):
    """A regular file or block device. `locking` "off" takes no locks: only for what nobody else can open.

    `auto_read_only` is taken because clients of QEMU always give it; what cannot be opened for writing is refused.
    """

    filename: str
    locking: Literal["auto", "on", "off"] = "auto"
    auto_read_only: bool = False


class HostDeviceOptions(FileOptions, tag="host_device"):
    """As `file`, for a block device."""


class RawOptions(_Options, tag="raw"):
    """The bytes of `file` as they are."""

    file: Child


class Qcow2Options(_Options, tag="qcow2"):
    """A qcow2 image in `file`.

    `backing` overrides what its header names; None (JSON null) opens it without one.
    """

    file: Child
    backing: Child | msgspec.UnsetType | None = msgspec.UNSET


class NullOptions(_Options, tag="null-co"):
    """No storage at all: reads give zeroes, writes are forgotten."""

    size: Size = 1 << 30
    read_zeroes: bool = True


class UnixAddress(msgspec.Struct, tag_field="type", tag="unix", forbid_unknown_fields=True):
    """A unix socket."""

    path: str


class InetAddress(msgspec.Struct, tag_field="type", tag="inet", forbid_unknown_fields=True):
    """A TCP address. The port is a string, as in QEMU."""

    host: str
    port: str


class NbdOptions(_Options, tag="nbd"):
    """An export of an NBD server."""

    server: UnixAddress | InetAddress
    export: str = ""


class CopyBeforeWriteOptions(_Options, tag="copy-before-write"):
    """The filter that keeps the past of `file`, in `target`. `cbw_timeout` is in seconds, 0 for none."""

    file: Child
    target: Child
    on_cbw_error: OnError = "break-snapshot"
    cbw_timeout: Seconds = TIMEOUT_S
    min_cluster_size: Size = 0


class SnapshotAccessOptions(_Options, tag="snapshot-access"):
    """The disk below the copy-before-write filter `file` as it was when the filter was made."""

    file: Child


class ThrottleOptions(_Options, tag="throttle"):
    """Limits requests and bytes a second, reads and writes together; 0 for no limit."""

    file: Child
    iops_total: Amount = 0
    bps_total: Amount = 0


class DelayOptions(_Options, tag="delay"):
    """Makes requests slow: seconds each kind waits before it goes on."""

    file: Child
    read_s: Amount = 0
    write_s: Amount = 0
    flush_s: Amount = 0


class LogOptions(_Options, tag="log"):
    """Logs a line for each request, at level DEBUG of the logger "fleecer.block.nodes.log"."""

    file: Child


class FaultRuleOptions(msgspec.Struct, rename="kebab", forbid_unknown_fields=True):
    """Makes matching requests fail with `errno`: after the first `after` of them, all, or only `times`.

    A `length` of 0 means everywhere.
    """

    operation: Operation
    errno: Annotated[int, msgspec.Meta(ge=1, le=4095)] = 5
    after: Size = 0
    times: Size = 0
    offset: Size = 0
    length: Size = 0


class FaultOptions(_Options, tag="fault"):
    """Fails what the rules name."""

    file: Child
    rules: list[FaultRuleOptions] = []


BlockdevOptions = (
    FileOptions
    | HostDeviceOptions
    | RawOptions
    | Qcow2Options
    | NullOptions
    | NbdOptions
    | CopyBeforeWriteOptions
    | SnapshotAccessOptions
    | ThrottleOptions
    | DelayOptions
    | LogOptions
    | FaultOptions
)
"""The options of a node, told apart by `driver`."""

Child = str | BlockdevOptions
"""A child: the name of a node, or the options of one that belongs to its parent."""


def parse_options(value: object) -> BlockdevOptions:
    """The options in a decoded JSON object. Raises UsageError that names the member at fault."""
    try:
        options: BlockdevOptions = msgspec.convert(value, type=BlockdevOptions)
    except msgspec.ValidationError as error:
        raise UsageError(f"block device options: {explain(error, BlockdevOptions, value)}") from None
    return options
