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


def export_uris(addresses: list[Record], export: str) -> list[str]:
    """The URIs of an export at the addresses that query-nbd-server told, those of unix sockets first."""
    local = [unix_uri(one["path"], export) for one in addresses if one["type"] == "unix"]
    return local + [tcp_uri(one["host"], int(one["port"]), export) for one in addresses if one["type"] != "unix"]


def located(addresses: list[Record], export: str) -> Record:
    """Where an export is, as --json shows it: {"uri", "uris"}, the first one and all; null and [] if it is nowhere."""
    uris = export_uris(addresses, export)
    return {"uri": uris[0] if uris else None, "uris": uris}


def snapshot_record(taken: Record, addresses: list[Record], *, detailed: bool = False) -> Record:
    """A snapshot as --json shows it: {"name", "created", "disks": [{"name", "size", "uri", "uris"}]}.

    In detail each disk also has {"bytes_preserved", "state", "cause"}, the last one if it is broken.
    """
    parts = [
        {"name": part["name"], "size": part["size"]}
        | located(addresses, part["export"])
        | (_condition(part) if detailed else {})
        for part in taken["disks"]
    ]
    return {"name": taken["name"], "created": taken["created"], "disks": parts}


def part_record(taken: Record, part: Record, addresses: list[Record]) -> Record:
    """A snapshot as one of its disks shows it in --json."""
    head = {"name": taken["name"], "created": taken["created"]}
    return head | located(addresses, part["export"]) | _condition(part)


def state_of(part: Record) -> str:
    """A disk's part of a snapshot in a table: "active", or "broken: CAUSE"."""
    return f"{part['state']}: {part['cause']}" if "cause" in part else str(part["state"])


def _condition(part: Record) -> Record:
    record = {"bytes_preserved": part["bytes-preserved"], "state": part["state"]}
    return record | ({"cause": part["cause"]} if "cause" in part else {})
