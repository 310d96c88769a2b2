"""Run directories: one daemon each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleecer.app.rundir import claimed, default_run_directory
from fleecer.errors import InUse, UsageError


def test_a_run_directory_is_made_for_its_owner_alone_and_can_be_claimed_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    for _ in range(2):
        with claimed(str(path)) as given:
            assert given == str(path)
            assert path.stat().st_mode & 0o777 == 0o700
            assert (path / "daemon.lock").read_text() == f"{os.getpid()}\n"


def test_a_second_claim_names_the_process_that_has_it(tmp_path: Path) -> None:
    with claimed(str(tmp_path / "run")), pytest.raises(InUse) as caught, claimed(str(tmp_path / "run")):
        pass
    assert str(caught.value) == (
        f"run directory '{tmp_path / 'run'}' is in use by process {os.getpid()}; stop that, or "
        "choose another with --run-dir"
    )


def test_a_claim_ends_with_its_process_and_what_is_in_the_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "run"
    script = "import os, sys\nfrom fleecer.app.rundir import claimed\nwith claimed(sys.argv[1]): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    (path / "nbd.sock").write_bytes(b"somebody's file")
    with claimed(str(path)):
        assert (path / "nbd.sock").read_bytes() == b"somebody's file"


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(0o770)
    with (
        pytest.raises(UsageError, match=r"by other users \(mode 770\); take that from them \(chmod go-w\), or"),
        claimed(str(path)),
    ):
        pass


@pytest.mark.parametrize("below", ["", "x"])
def test_a_file_in_place_of_the_directory_is_told_with_what_to_do(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    path = tmp_path / "file" / below
    with pytest.raises(UsageError) as caught, claimed(str(path)):
        pass
    assert str(caught.value) == (
        f"run directory '{path}': it, or a part of its path, is no directory; choose another with --run-dir"
    )
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_another_users_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with (
        pytest.raises(UsageError, match=rf"belongs to user {owner}, not to you \({owner + 1}\)"),
        claimed(str(tmp_path)),
    ):
        pass


def test_a_path_too_long_for_sockets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100)
    with pytest.raises(UsageError, match="its sockets' paths would be longer than 107 bytes"), claimed(str(path)):
        pass
    assert not path.exists()


def test_the_default_is_told_by_user_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_run_directory() == "/run/fleecer"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_run_directory() == "/run/user/1000/fleecer"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(UsageError, match="name one with --run-dir"):
        default_run_directory()
