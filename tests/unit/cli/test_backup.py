"""`fleecer backup` and a daemon that ends at the wrong moment."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from fleecer.cli import backup as module
from fleecer.cli import disks
from fleecer.wire.qmp import QmpError

RECORD = {"name": "web", "path": "/backups/web/x.qcow2"}


class EndingDaemon:
    """A daemon that takes a snapshot, and is ending when that is to be deleted."""

    def need_fleecer(self, purpose: str) -> None:
        pass

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "snapshot-delete":
            raise QmpError("GenericError", "the daemon is shutting down")
        return {"name": "now", "disks": []}


def test_a_daemon_that_ends_when_all_is_copied_does_not_make_the_backup_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextlib.contextmanager
    def connect(_run_dir: str | None, _qmp: str | None) -> Iterator[EndingDaemon]:
        yield EndingDaemon()

    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(disks, "nbd_socket", lambda _client: "nbd.sock")
    monkeypatch.setattr(module, "_copy", lambda *_: [RECORD])
    result = CliRunner().invoke(module.backup, ["--to", "backups", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"disks": [RECORD]}
    assert result.stderr == (
        "fleecer: all backups are whole; snapshot 'now' could not be deleted, and ends with this command: "
        "the daemon is shutting down\n"
    )
