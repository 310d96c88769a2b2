"""The program `fleecer`: thin commands that speak QMP to a daemon, or start one.

This module is all that is imported before stop signals are taken care of, so that Ctrl-C ends the program with one line
whenever it is pressed; program.py has the commands.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """The entry point."""
    try:
        from fleecer.app import signals

        signals.end_at_once()
    except KeyboardInterrupt:
        sys.stderr.write("fleecer: interrupted\n")
        sys.exit(130)
    from fleecer.cli.program import run

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does with what its encoding lacks
    signals.raise_interrupted()
    try:
        status = run(sys.argv[1:])
    except signals.Interrupted as interrupted:  # on the way into `run`, or out of it
        sys.stderr.write(f"fleecer: {interrupted}\n")
        status = interrupted.status
    signals.ignore()
    sys.exit(status)
