"""The command line: which commands there are, and how one ends.

Exit status: 0; 1 with one line on standard error for what failed; 2 with one line for a wrong command line; 130 after
Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, with one line. Commands are imported when they are needed, and libraries
inside them, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from fleecer import __version__
from fleecer.app.signals import Interrupted
from fleecer.cli.output import print_error
from fleecer.errors import FleecerError, told

_COMMANDS = ("serve", "snapshot", "backup", "restore", "status", "demo", "storage-daemon")


class _Commands(click.Group):
    """The commands, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        match cmd_name:
            case "serve":
                from fleecer.cli.serve import serve as command
            case "snapshot":
                from fleecer.cli.snapshot import snapshot as command
            case "backup":
                from fleecer.cli.backup import backup as command
            case "restore":
                from fleecer.cli.restore import restore as command
            case "status":
                from fleecer.cli.status import status as command
            case "demo":
                from fleecer.cli.demo import demo as command
            case "storage-daemon":
                from fleecer.cli.storage_daemon import storage_daemon as command
            case _:
                return None
        return command


@click.group(cls=_Commands, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleecer", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve live disks over NBD, and hand out their past while they are written.

    \b
    fleecer serve web=web.qcow2                 serve a disk
    fleecer snapshot create                     an instant, exact copy of every disk, over NBD
    fleecer backup --to /backups                the same, kept as qcow2 images
    fleecer restore /backups/web/TIME.qcow2 web.raw
    """


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit status."""
    try:
        result = cli.main(args=list(arguments), prog_name="fleecer", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fleecer"
        return _fail(f"{error.format_message().rstrip('.')}; see {where} --help", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except FleecerError as error:
        return _fail(told(error), 1)
    except Interrupted as interrupted:
        return _fail(str(interrupted), interrupted.status)
    except OSError as error:
        # All others are wrapped where they are raised: this is what we print. At exit no more of it is tried.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1 if isinstance(error, BrokenPipeError) else _fail(f"standard output: {told(error)}", 1)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int) -> int:
    print_error(message)
    return status
