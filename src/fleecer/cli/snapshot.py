"""`fleecer snapshot`: create, list and delete."""

from __future__ import annotations

import datetime
import os
from typing import Any

import click

from fleecer.app import signals
from fleecer.cli import disks
from fleecer.cli.options import (
    SECONDS_MAX,
    connect,
    daemon_options,
    json_option,
    scratch_dir_option,
    within_seconds,
)
from fleecer.cli.output import age, print_json, print_table
from fleecer.cli.qmp_client import ANSWER_TIMEOUT_S
from fleecer.errors import NotFound
from fleecer.units import format_size


@click.group(no_args_is_help=False, short_help="Instant copies of served disks.")
def snapshot() -> None:
    """Instant, exact, read-only copies of served disks, read over NBD while the disks are written.

    \b
    fleecer snapshot create web data
    fleecer snapshot list
    fleecer snapshot delete 20300101T120000Z
    """


@snapshot.command(short_help="Take a snapshot, all disks at one instant.")
@click.argument("names", nargs=-1, metavar="[DISK]...")
@click.option("--name", help="The snapshot's name [default: the time, in UTC].")
@scratch_dir_option
@click.option(
    "--cbw-timeout",
    callback=within_seconds,
    metavar="SECONDS",
    help=f"How long a write may wait for a copy, up to {SECONDS_MAX}; 0: without bound [default: 15].",
)
@click.option(
    "--on-cbw-error",
    type=click.Choice(["break-snapshot", "break-guest-write"]),
    help="What gives way when old data cannot be kept [default: break-snapshot].",
)
@json_option
@daemon_options
def create(
    names: tuple[str, ...],
    name: str | None,
    scratch_dir: str | None,
    cbw_timeout: float | None,
    on_cbw_error: str | None,
    as_json: bool,
    run_dir: str | None,
    qmp: str | None,
) -> None:
    """Take a snapshot of the disks named (default: all) at one instant, and print the NBD URIs of each.

    A daemon that listens at TCP too has a second URI for each disk. The snapshot stays until it is deleted.

    \b
    fleecer snapshot create --name now web
    fleecer snapshot create --scratch-dir /var/tmp --cbw-timeout 5 --json
    """
    chosen: dict[str, Any] = {
        "disks": list(names) or None,
        "name": name,
        "scratch-dir": os.path.abspath(scratch_dir) if scratch_dir is not None else None,
        "cbw-timeout": cbw_timeout,
        "on-cbw-error": on_cbw_error,
        "temporary": True,
    }
    with connect(run_dir, qmp) as client:
        client.need_fleecer("take a snapshot")
        arguments = {key: value for key, value in chosen.items() if value is not None}
        taken = client.execute("snapshot-create", arguments)
        record = disks.snapshot_record(taken, client.execute("query-nbd-server"))
        if as_json:
            print_json(record)
        else:
            # In one piece: a reader of the first line only (`head`) must not make the rest fail.
            click.echo("\n".join(uri for disk in record["disks"] for uri in disk["uris"]))
        # It goes with this connection until it is told of, so that none is left of which nobody knows.
        signals.ignore()
        client.execute("snapshot-keep", {"name": taken["name"]}, timeout_s=ANSWER_TIMEOUT_S)


@snapshot.command("list", short_help="List the snapshots there are.")
@json_option
@daemon_options
def list_(as_json: bool, run_dir: str | None, qmp: str | None) -> None:
    """List snapshots: name, disk, age, old data preserved so far, state, and the cause where one is broken.

    PRESERVED is the old data that a snapshot itself keeps. What is overwritten is kept once, by the newest snapshot of
    the disk at that time; older ones share it, and do not count it until that one is deleted or breaks.

    \b
    fleecer snapshot list
    fleecer snapshot list --json
    """
    with connect(run_dir, qmp) as client:
        client.need_fleecer("take snapshots")
        found = client.execute("query-snapshots")
        addresses = client.execute("query-nbd-server")
    if as_json:
        print_json({"snapshots": [disks.snapshot_record(taken, addresses, detailed=True) for taken in found]})
        return
    now = datetime.datetime.now(datetime.UTC)
    rows = [
        (
            taken["name"],
            part["name"],
            age(taken["created"], now),
            format_size(part["bytes-preserved"]),
            disks.state_of(part),
        )
        for taken in found
        for part in taken["disks"]
    ]
    print_table(("NAME", "DISK", "AGE", "PRESERVED", "STATE"), rows)


@snapshot.command(short_help="Delete snapshots.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
@daemon_options
def delete(names: tuple[str, ...], as_json: bool, run_dir: str | None, qmp: str | None) -> None:
    """Delete snapshots: their readers' requests in flight end, then they are disconnected, and the scratch is freed.

    What an older snapshot of the same disk still reads in a scratch is kept, and counts as preserved there.

    \b
    fleecer snapshot delete now
    fleecer snapshot delete 20300101T120000Z 20300102T120000Z
    """
    with connect(run_dir, qmp) as client:
        client.need_fleecer("take snapshots")
        there = {snapshot["name"] for snapshot in client.execute("query-snapshots")}
        for name in names:
            if name not in there:
                raise NotFound("snapshot", name)
        for name in dict.fromkeys(names):
            client.execute("snapshot-delete", {"name": name})
    if as_json:
        print_json({"deleted": list(names)})
