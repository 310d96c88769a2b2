"""A short soak of the real daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.soak.__main__ import soak
from tests.soak.driver import Settings
from tests.soak.readers import missing_programs

pytestmark = pytest.mark.peer

SETTINGS = Settings(seconds=10.0, seed=1, snapshot_every_s=0.8, life_s=2.0, mishap_every_s=1.2, readers=4)


def test_a_short_soak_finds_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not missing_programs()
    directory = tmp_path / "soak"
    directory.mkdir()
    status = soak(SETTINGS, directory, lambda _: None)
    told = capsys.readouterr().out
    assert status == 0, told
    assert "wrong bytes 0" in told
    assert "snapshots checked 0" not in told
    assert "(0 by kill -9)" not in told
    assert os.listdir(tmp_path) == []
