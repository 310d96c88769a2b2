"""What a daemon's answers mean: where it serves NBD, its disks and snapshots with their URIs."""

from __future__ import annotations

from typing import Any

from fleecer.cli.qmp_client import QmpClient
from fleecer.errors import UsageError, quoted
from fleecer.net.uri import tcp_uri, unix_uri

Record = dict[str, Any]


def nbd_socket(client: QmpClient) -> str:
    """The unix socket at which the daemon serves NBD. Raises UsageError if it has none."""
    for address in client.execute("query-nbd-server"):
        if address["type"] == "unix":
            return str(address["path"])
    raise UsageError(f"the daemon at {quoted(client.path)} serves NBD at no unix socket; start one: nbd-server-start")


def export_uri(addresses: list[Record], export: str) -> str | None:
    """The URI of an export at the addresses that query-nbd-server told, a unix socket first; None if there are none."""
    for address in addresses:
        if address["type"] == "unix":
            return unix_uri(address["path"], export)
    for address in addresses:
        return tcp_uri(address["host"], int(address["port"]), export)
    return None


def snapshot_record(taken: Record, addresses: list[Record], *, detailed: bool = False) -> Record:
    """A snapshot as --json shows it: {"name", "created", "disks": [{"name", "size", "uri"}]}.

    In detail each disk also has {"bytes_preserved", "state", "cause"}, the last one if it is broken.
    """
    parts = [
        {"name": part["name"], "size": part["size"], "uri": export_uri(addresses, part["export"])}
        | (_condition(part) if detailed else {})
        for part in taken["disks"]
    ]
    return {"name": taken["name"], "created": taken["created"], "disks": parts}


def part_record(taken: Record, part: Record, addresses: list[Record]) -> Record:
    """A snapshot as one of its disks shows it in --json."""
    head = {"name": taken["name"], "created": taken["created"], "uri": export_uri(addresses, part["export"])}
    return head | _condition(part)


def _condition(part: Record) -> Record:
    record = {"bytes_preserved": part["bytes-preserved"], "state": part["state"]}
    return record | ({"cause": part["cause"]} if "cause" in part else {})
