"""`fleecer restore`: an image out of a backup, verified."""

from __future__ import annotations

from typing import Any, Literal

import click

from fleecer.cli.options import json_option, not_empty
from fleecer.cli.output import print_json
from fleecer.cli.progress import Meter
from fleecer.units import format_size


@click.command(short_help="Write an image out of a backup, and verify it.")
@click.argument("backup", callback=not_empty, metavar="BACKUP")
@click.argument("target", callback=not_empty, metavar="TARGET")
@click.option(
    "--format",
    "target_format",
    type=click.Choice(["raw", "qcow2"]),
    help="TARGET's format; without it its ending tells: .qcow2 .raw .img",
)
@click.option(
    "--backup-format",
    type=click.Choice(["raw", "qcow2"]),
    help="BACKUP's format; without it its ending tells.",
)
@click.option("--force", is_flag=True, help="Replace an existing file, or overwrite a block device.")
@click.option(
    "--allow-backing",
    callback=not_empty,
    multiple=True,
    metavar="DIR",
    help="Let BACKUP's backing files be in DIR too.",
)
@json_option
def restore(
    backup: str,
    target: str,
    target_format: Literal["raw", "qcow2"] | None,
    backup_format: Literal["raw", "qcow2"] | None,
    force: bool,
    allow_backing: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write the image BACKUP into TARGET, read it back, and compare.

    A new file appears under its name only once it is verified and durable. Holes stay holes.

    \b
    fleecer restore /backups/web/20300101T120000Z.qcow2 web.raw
    fleecer restore --force --format raw /backups/web/20300101T120000Z.qcow2 /dev/vg0/web
    """
    from fleecer.app import images, runner

    with Meter(silent=as_json) as meter:

        def report(phase: images.Phase, amount: Any) -> None:
            meter.show(target, phase, amount)

        work = images.restore(
            backup,
            target,
            format=target_format,
            backup_format=backup_format,
            force=force,
            allow_backing=allow_backing,
            report=report,
        )
        done = runner.run(work)
    if as_json:
        print_json(
            {
                "target": done.target,
                "format": done.format,
                "size": done.size,
                "bytes_written": done.bytes_written,
                "verified": True,
                "seconds": round(done.seconds, 3),
            }
        )
        return
    told = f"{done.format}, {format_size(done.bytes_written)} of {format_size(done.size)}"
    click.echo(f"{done.target}: restored and verified ({told} in {done.seconds:.1f} s)")
