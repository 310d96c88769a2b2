"""`fleecer serve`: serves disk images in the foreground."""

from __future__ import annotations

import os
from typing import Literal

import click

from fleecer.app.rundir import default_run_directory
from fleecer.cli.options import not_empty, run_dir_option


@click.command(short_help="Serve disk images over NBD.")
@click.argument("images", nargs=-1, required=True, callback=not_empty, metavar="[NAME=]IMAGE...")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["raw", "qcow2"]),
    help="Format of every image named; without it their endings tell: .qcow2 .raw .img",
)
@click.option("--read-only", is_flag=True, help="Let clients read only.")
@click.option(
    "--listen",
    metavar="HOST[:PORT]",
    help="Serve at TCP too [default port: 10809]. Whoever reaches it may read and write. URIs show this machine's "
    "name where HOST is 0.0.0.0 or [::].",
)
@click.option(
    "--allow-backing",
    callback=not_empty,
    multiple=True,
    metavar="DIR",
    help="Let backing files be in DIR too; repeatable.",
)
@run_dir_option
def serve(
    images: tuple[str, ...],
    image_format: Literal["raw", "qcow2"] | None,
    read_only: bool,
    listen: str | None,
    allow_backing: tuple[str, ...],
    run_dir: str | None,
) -> None:
    """Serve disk images over NBD until told to stop (Ctrl-C, SIGTERM, QMP quit).

    NAME is what clients ask for; without it, the file's name without its ending. An IMAGE with '=' in its name needs
    a NAME=, or a path such as ./a=b.raw. One line per disk, its name and its NBD URIs, is printed once all are ready.

    \b
    fleecer serve web=web.qcow2 data=data.raw
    fleecer serve --listen 127.0.0.1:10809 web.qcow2
    fleecer serve --format raw /dev/vg0/web
    """
    from fleecer.app import runner
    from fleecer.app import serving as app

    disks = [app.disk_named(text, image_format) for text in images]
    options = app.ServeOptions(
        disks=disks,
        run_directory=run_dir or default_run_directory(),
        listen=listen,
        read_only=read_only,
        allow_backing=tuple(os.path.abspath(directory) for directory in allow_backing),
    )
    app.log_to_stderr()
    runner.run(app.serve(options, click.echo), ends_in_order=True)
