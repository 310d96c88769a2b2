"""`fleecer storage-daemon`: the same options as qemu-storage-daemon."""

from __future__ import annotations

import click

from fleecer.errors import UsageError


@click.command(
    "storage-daemon",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    short_help="A daemon with qemu-storage-daemon's options.",
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTION VALUE]...")
def storage_daemon(options: tuple[str, ...]) -> None:
    """Run a daemon put together by qemu-storage-daemon's options, carried out in the order given.

    \b
    --blockdev driver=DRIVER,node-name=NAME,...   a node; or a JSON object
    --nbd-server addr.type=unix,addr.path=PATH    serve NBD; or addr.type=inet,addr.host=HOST,addr.port=PORT
    --export type=nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
    --chardev socket,id=ID,path=PATH,server=on,wait=off
    --monitor chardev=ID                          QMP there
    --pidfile PATH                                written when what comes before it is done, removed at the end

    \b
    fleecer storage-daemon \\
      --blockdev driver=file,node-name=file0,filename=web.qcow2 \\
      --blockdev driver=qcow2,node-name=disk0,file=file0 \\
      --nbd-server addr.type=unix,addr.path=nbd.sock \\
      --export type=nbd,id=web,node-name=disk0,writable=on \\
      --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off --monitor chardev=qmp
    """
    from fleecer.app import runner
    from fleecer.app import serving as app
    from fleecer.app import storage_daemon as daemon

    try:
        given = daemon.split(options)
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    app.log_to_stderr()
    runner.run(daemon.run(given), ends_in_order=True)
