"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fleecer.app.rundir import QMP_SOCKET, default_run_directory
from fleecer.cli.qmp_client import QmpClient

F = TypeVar("F", bound=Callable[..., Any])

run_dir_option = click.option(
    "--run-dir",
    metavar="DIR",
    help="The daemon's run directory [default: $XDG_RUNTIME_DIR/fleecer, root: /run/fleecer].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


def daemon_options(function: F) -> F:
    """--run-dir and --qmp: which daemon to speak to."""
    qmp = click.option("--qmp", metavar="SOCKET", help="A QMP socket, instead of the one in the run directory.")
    return run_dir_option(qmp(function))


def connect(run_dir: str | None, qmp: str | None) -> QmpClient:
    """Connects to the daemon that the options name. Raises UsageError, IoError or RemoteProtocolError."""
    if run_dir is not None and qmp is not None:
        raise click.UsageError("--run-dir and --qmp exclude each other")
    return QmpClient(qmp or os.path.join(run_dir or default_run_directory(), QMP_SOCKET))
