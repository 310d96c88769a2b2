"""`fleecer status`: the disks that are served, their clients and traffic, and their snapshots."""

from __future__ import annotations

import datetime
import time
from typing import Any

import click

from fleecer.cli import disks
from fleecer.cli.options import connect, daemon_options, json_option
from fleecer.cli.output import age, print_json, print_table
from fleecer.cli.qmp_client import QmpClient
from fleecer.units import format_size

SAMPLE_S = 0.5


@click.command(short_help="Show disks, clients, rates and snapshots.")
@json_option
@daemon_options
def status(as_json: bool, run_dir: str | None, qmp: str | None) -> None:
    """Show the disks that are served, their clients, what they read and write a second, the snapshots, and all URIs.

    PRESERVED is old data that a snapshot itself keeps; see fleecer snapshot list --help.

    \b
    fleecer status
    fleecer status --json
    """
    with connect(run_dir, qmp) as client:
        if as_json:
            print_json({"disks": _records(client)})
        elif client.is_fleecer:
            _show(client)
        else:
            rows = [(r["name"], format_size(r["size"]), r["format"]) for r in _exports(client)]
            print_table(("EXPORT", "SIZE", "FORMAT"), rows)


def _records(client: QmpClient) -> list[dict[str, Any]]:
    if not client.is_fleecer:
        return _exports(client)
    addresses = client.execute("query-nbd-server")
    snapshots = client.execute("query-snapshots")
    return [
        {
            "name": disk["name"],
            "size": disk["size"],
            "format": disk["format"],
            **disks.located(addresses, disk["name"]),
            **({"problem": disk["problem"]} if "problem" in disk else {}),
            "snapshots": [
                disks.part_record(taken, part, addresses)
                for taken in snapshots
                for part in taken["disks"]
                if part["name"] == disk["name"]
            ],
        }
        for disk in client.execute("query-disks")
    ]


def _exports(client: QmpClient) -> list[dict[str, Any]]:
    """The exports of a QEMU, in the form of our own disks. It tells neither addresses nor snapshots."""
    nodes = {node["node-name"]: node for node in client.execute("query-named-block-nodes")}
    records: list[dict[str, Any]] = []
    for export in client.execute("query-block-exports"):
        node = nodes[export["node-name"]]
        size = node["image"]["virtual-size"]
        records.append(
            {"name": export["id"], "size": size, "format": node["drv"], "uri": None, "uris": [], "snapshots": []}
        )
    return records


def _show(client: QmpClient) -> None:
    before, begun_s = {disk["name"]: disk for disk in client.execute("query-disks")}, time.monotonic()
    time.sleep(SAMPLE_S)
    after, seconds = client.execute("query-disks"), time.monotonic() - begun_s
    rows = []
    for disk in after:
        old = before.get(disk["name"], disk)
        read, written = ((disk[key] - old[key]) / seconds for key in ("bytes-read", "bytes-written"))
        rows.append(
            (
                disk["name"],
                format_size(disk["size"]),
                disk["format"] + ("" if disk["writable"] else ", read-only"),
                str(disk["clients"]),
                f"{format_size(read)}/s",
                f"{format_size(written)}/s",
                disk["file"],
            )
        )
    print_table(("DISK", "SIZE", "FORMAT", "CLIENTS", "READ", "WRITTEN", "IMAGE"), rows)
    for disk in after:
        if "problem" in disk:
            click.echo(f"{disk['name']}: {disk['problem']}")
    found = client.execute("query-snapshots")
    if found:
        now = datetime.datetime.now(datetime.UTC)
        click.echo()
        print_table(
            ("SNAPSHOT", "DISK", "AGE", "PRESERVED", "CLIENTS", "STATE"),
            [
                (
                    taken["name"],
                    part["name"],
                    age(taken["created"], now),
                    format_size(part["bytes-preserved"]),
                    str(part["clients"]),
                    disks.state_of(part),
                )
                for taken in found
                for part in taken["disks"]
            ],
        )
    addresses = client.execute("query-nbd-server")
    exports = [disk["name"] for disk in after] + [part["export"] for taken in found for part in taken["disks"]]
    located = [(export, uri) for export in exports for uri in disks.export_uris(addresses, export)]
    if located:
        click.echo()
        print_table(("EXPORT", "URI"), located)
