"""`fleecer backup`: a snapshot, copied into qcow2 images, and dropped."""

from __future__ import annotations

import datetime
import os
from typing import Any

import click

from fleecer.cli import disks
from fleecer.cli.options import connect, daemon_options, json_option, not_empty, scratch_dir_option
from fleecer.cli.output import print_error, print_json
from fleecer.cli.progress import Meter
from fleecer.cli.qmp_client import ANSWER_TIMEOUT_S, QmpClient
from fleecer.errors import FleecerError, UsageError, quoted, told
from fleecer.units import format_size


@click.command(short_help="Back served disks up while they are written.")
@click.argument("names", nargs=-1, metavar="[DISK]...")
@click.option(
    "--to",
    "directory",
    required=True,
    callback=not_empty,
    metavar="DIR",
    help="Where backups go: DIR/DISK/TIME.qcow2, mode 0600.",
)
@scratch_dir_option
@json_option
@daemon_options
def backup(
    names: tuple[str, ...], directory: str, scratch_dir: str | None, as_json: bool, run_dir: str | None, qmp: str | None
) -> None:
    """Back up the disks named (default: all), as they are at one instant, while they are written.

    Each backup is a standard qcow2 image, DIR/DISK/TIME.qcow2, TIME being the instant in UTC. It appears whole and
    durable, or not at all; the snapshot it is read from, which snapshot list shows meanwhile, goes in any case. Where a
    backup of the same second exists, the new one is TIME-2.qcow2.

    \b
    fleecer backup --to /backups
    fleecer backup web data --to /backups --json
    """
    with connect(run_dir, qmp) as client:
        client.need_fleecer("take a snapshot")
        socket_path = disks.nbd_socket(client)
        arguments: dict[str, Any] = {"temporary": True}
        if names:
            arguments["disks"] = list(names)
        if scratch_dir is not None:
            arguments["scratch-dir"] = os.path.abspath(scratch_dir)
        taken = client.execute("snapshot-create", arguments)
        records = _copy(client, taken, socket_path, directory, as_json)
        _drop(client, taken["name"])
    if as_json:
        print_json({"disks": records})


def _copy(
    client: QmpClient, taken: dict[str, Any], socket_path: str, directory: str, as_json: bool
) -> list[dict[str, Any]]:
    from fleecer.app import images, runner

    created = datetime.datetime.fromisoformat(taken["created"])
    stem = created.astimezone(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    records: list[dict[str, Any]] = []
    with Meter(silent=as_json) as meter:
        for part in taken["disks"]:
            name = part["name"]
            if name in ("", ".", "..") or "/" in name:
                raise UsageError(f"disk name {quoted(name)} cannot name a directory; export it under another")

            def report(phase: images.Phase, amount: Any, name: str = name) -> None:
                client.pass_over_events()  # a copy may take hours, and our connection keeps the snapshot
                meter.show(name, phase, amount)

            place = os.path.join(directory, name)
            try:
                done = runner.run(images.back_up(socket_path, part["export"], place, stem, report=report))
            except FleecerError as error:
                raise _explained(client, taken["name"], name, error) from error
            meter.end_line()
            records.append(
                {
                    "name": name,
                    "path": os.path.abspath(done.path),
                    "kind": "full",
                    "bytes_read": done.bytes_read,
                    "bytes_written": done.bytes_written,
                    "seconds": round(done.seconds, 3),
                }
            )
            if not as_json:
                told = f"{format_size(done.bytes_written)} of {format_size(part['size'])} in {done.seconds:.1f} s"
                click.echo(f"{name}: {done.path} ({told})")
    return records


def _explained(client: QmpClient, snapshot: str, disk: str, error: FleecerError) -> FleecerError:
    """What ended the copy of a disk: the end of the daemon or of the snapshot, if it was that; else `error`."""
    where = f"while disk {quoted(disk)} was copied; there is no backup of it"
    try:
        found = client.execute("query-snapshots", timeout_s=ANSWER_TIMEOUT_S)
    except FleecerError:
        return FleecerError(f"the daemon at {quoted(client.path)} ended {where}")
    parts = [part for taken in found if taken["name"] == snapshot for part in taken["disks"] if part["name"] == disk]
    if not parts:
        return FleecerError(f"snapshot {quoted(snapshot)} was deleted {where}")
    if "cause" in parts[0]:
        return FleecerError(f"snapshot {quoted(snapshot)} broke {where}: {parts[0]['cause']}")
    return error


def _drop(client: QmpClient, name: str) -> None:
    """Deletes the snapshot and waits for that. If we do not get here, it goes with our connection.

    The backups are whole by now, so a daemon that is ending just then does not make them a failure.
    """
    try:
        client.execute("snapshot-delete", {"name": name})
    except FleecerError as error:
        left = f"snapshot {quoted(name)} could not be deleted, and ends with this command: {told(error)}"
        print_error(f"all backups are whole; {left}")
