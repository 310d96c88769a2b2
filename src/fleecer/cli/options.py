"""Options that several commands have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fleecer.app.rundir import QMP_SOCKET, default_run_directory
from fleecer.cli.qmp_client import QmpClient

F = TypeVar("F", bound=Callable[..., Any])

SECONDS_MAX = 86400


def not_empty(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Callback of options and arguments that are paths: an empty one would be the current directory, by accident."""
    if value == "" or (isinstance(value, tuple) and "" in value):
        raise click.BadParameter("it is empty; name a path", ctx, param)
    return value


def within_seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Callback of options that are time-outs, within what a daemon takes."""
    try:
        seconds = float(value) if value is not None else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not 0 <= seconds <= SECONDS_MAX:
        raise click.BadParameter(f"{value!r} is not a number of seconds from 0 to {SECONDS_MAX}", ctx, param)
    return seconds


run_dir_option = click.option(
    "--run-dir",
    callback=not_empty,
    metavar="DIR",
    help="The daemon's run directory [default: $XDG_RUNTIME_DIR/fleecer, root: /run/fleecer].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
scratch_dir_option = click.option(
    "--scratch-dir",
    callback=not_empty,
    metavar="DIR",
    help="Where overwritten data is kept [default: beside each image].",
)


def daemon_options(function: F) -> F:
    """--run-dir and --qmp: which daemon to speak to."""
    qmp = click.option(
        "--qmp", callback=not_empty, metavar="SOCKET", help="A QMP socket, instead of the one in the run directory."
    )
    return run_dir_option(qmp(function))


def connect(run_dir: str | None, qmp: str | None) -> QmpClient:
    """Connects to the daemon that the options name. Raises UsageError, IoError or RemoteProtocolError."""
    if run_dir is not None and qmp is not None:
        raise click.UsageError("--run-dir and --qmp exclude each other")
    return QmpClient(qmp or os.path.join(run_dir or default_run_directory(), QMP_SOCKET))
