"""`fleecer status` tells what is the matter with a disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from fleecer.cli import status as module

DISK = {
    "name": "web",
    "size": 1 << 20,
    "format": "qcow2",
    "writable": True,
    "clients": 2,
    "bytes-read": 0,
    "bytes-written": 0,
    "file": "web.qcow2",
    "problem": "image 'web.qcow2' is corrupt",
}


class Answers:
    """A daemon that says the same each time."""

    is_fleecer = True

    def execute(self, command: str) -> Any:
        return {"query-disks": [DISK], "query-snapshots": [], "query-nbd-server": []}[command]


@pytest.fixture(autouse=True)
def damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def connect(_run_dir: str | None, _qmp: str | None) -> Iterator[Answers]:
        yield Answers()

    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(module, "SAMPLE_S", 0.0)


def test_a_disks_problem_is_shown() -> None:
    shown = CliRunner().invoke(module.status, [])
    assert "web: image 'web.qcow2' is corrupt" in shown.output.splitlines()


def test_a_disks_problem_is_in_the_document() -> None:
    document = json.loads(CliRunner().invoke(module.status, ["--json"]).output)
    assert document["disks"][0]["problem"] == "image 'web.qcow2' is corrupt"
