"""New files: whole under their name, or not there."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from fleecer.errors import IoError
from fleecer.storage import newfile
from fleecer.storage.newfile import NewFile, made_directories
from fleecer.storage.syncs import SWITCH_VARIABLE

real_open = os.open


@pytest.fixture(params=["unnamed", "hidden", "hidden, no links"])
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With O_TMPFILE; on a file system without it; on one that has no hard links either."""

    def without_tmpfile(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return real_open(path, flags, mode)

    def without_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param != "unnamed":
        monkeypatch.setattr(os, "open", without_tmpfile)
    if request.param == "hidden, no links":
        monkeypatch.setattr(os, "link", without_links)


async def made(directory: Path, content: bytes) -> NewFile:
    new = await NewFile.create(str(directory))
    await new.storage.pwrite(0, content)
    return new


@pytest.mark.usefixtures("_kind")
async def test_nothing_is_to_be_seen_until_the_whole_file_appears(tmp_path: Path) -> None:
    new = await made(tmp_path, b"whole")
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    await new.publish(str(tmp_path / "image"))
    await new.storage.close()
    assert os.listdir(tmp_path) == ["image"]
    assert (tmp_path / "image").read_bytes() == b"whole"
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("_kind")
async def test_a_file_given_up_leaves_nothing(tmp_path: Path) -> None:
    new = await made(tmp_path, b"half")
    await new.give_up()
    await new.storage.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("_kind")
async def test_whoever_is_cancelled_while_a_file_is_made_leaves_nothing(tmp_path: Path) -> None:
    making = asyncio.ensure_future(NewFile.create(str(tmp_path)))
    await asyncio.sleep(0)
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("_kind")
async def test_an_existing_file_is_never_overwritten_and_another_name_may_be_tried(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"old")
    new = await made(tmp_path, b"new")
    with pytest.raises(IoError, match=r"create on .*image.: File exists") as caught:
        await new.publish(str(tmp_path / "image"))
    assert caught.value.errno == errno.EEXIST
    await new.publish(str(tmp_path / "image-2"))
    await new.give_up()
    await new.storage.close()
    assert (tmp_path / "image").read_bytes() == b"old"
    assert (tmp_path / "image-2").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["image", "image-2"]


@pytest.mark.parametrize("tmpfile", [True, False])
async def test_replacing_keeps_the_mode_and_leaves_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpfile: bool
) -> None:
    if not tmpfile:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    (tmp_path / "image").write_bytes(b"old")
    (tmp_path / "image").chmod(0o640)
    before = (tmp_path / "image").stat().st_ino
    new = await made(tmp_path, b"new")
    await new.publish(str(tmp_path / "image"), replace=True)
    await new.storage.close()
    assert os.listdir(tmp_path) == ["image"]
    assert (tmp_path / "image").read_bytes() == b"new"
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "image").stat().st_ino != before


async def test_the_file_is_synced_before_its_name_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH_VARIABLE, "off")
    steps: list[str] = []
    new = await made(tmp_path, b"x")
    fd_of_file = int(new.path.rsplit("/", 1)[1])
    real_fdatasync, real_fsync, real_link = os.fdatasync, os.fsync, os.link

    def fdatasync(fd: int) -> None:
        steps.append("file" if fd == fd_of_file else "?")
        real_fdatasync(fd)

    def fsync(fd: int) -> None:
        steps.append("directory" if os.fstat(fd).st_ino == tmp_path.stat().st_ino else "?")
        real_fsync(fd)

    def link(old: str, new: str, *, src_dir_fd: int, follow_symlinks: bool) -> None:
        steps.append("name")
        real_link(old, new, src_dir_fd=src_dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    await new.publish(str(tmp_path / "image"))
    monkeypatch.undo()
    await new.storage.close()
    assert steps == ["file", "name", "directory"]


async def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(IoError, match=r"create a file on .*absent.: No such file or directory"):
        await NewFile.create(str(tmp_path / "absent"))


async def test_directories_are_made_with_their_parents_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(newfile, "sync_directory", synced.append)
    for _ in range(2):
        async with made_directories(str(tmp_path / "a" / "b")):
            pass
        assert (tmp_path / "a" / "b").is_dir()
        assert synced == [str(tmp_path), str(tmp_path / "a")]


async def test_a_file_in_the_way_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(IoError, match=r"make directory on '.*/a': a file of that name is there"):
        async with made_directories(str(tmp_path / "a" / "b")):
            pass


@pytest.mark.parametrize("in_use", [False, True])
async def test_directories_made_for_what_fails_go_again_unless_something_is_in_them(
    tmp_path: Path, in_use: bool
) -> None:
    (tmp_path / "a").mkdir()

    async def fail_inside() -> None:
        async with made_directories(str(tmp_path / "a" / "b" / "c")):
            if in_use:
                (tmp_path / "a" / "b" / "theirs").write_bytes(b"")
            raise IoError(errno.ENOSPC, "image", "write", detail="no space")

    with pytest.raises(IoError, match="no space"):
        await fail_inside()
    assert (tmp_path / "a").is_dir(), "it was there before"
    assert (tmp_path / "a" / "b").exists() == in_use
    assert not (tmp_path / "a" / "b" / "c").exists()
