"""New files that appear under their name whole or not at all.

A new file has no name while it is written (O_TMPFILE), so that whatever ends the program leaves nothing behind. Where a
file system has no such files it has a hidden name in the same directory, removed when it is given up.

Invariants:
- A name is given only to a file that is durable; on return of `publish` the name is durable too.
- A file that exists under the name is kept, unless its replacement was asked for; that is one atomic step.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import io
import os
import secrets
from collections.abc import AsyncIterator
from typing import Final

from fleecer.errors import IoError
from fleecer.storage.file import FileStorage
from fleecer.storage.lanes import Lane
from fleecer.storage.paths import open_unnamed, sync_directory
from fleecer.storage.pool import running_pool

_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class NewFile:
    """A file on its way. `storage` writes it, and belongs to the caller, who closes it after `publish`.

    `path` opens it by this process, under whatever name it has, until `storage` is closed.
    """

    def __init__(self, file: io.FileIO, directory: str, hidden: str | None) -> None:
        self.storage: Final = FileStorage(file, os.path.join(directory, "(new file)"), read_only=False)
        self.path: Final = f"/proc/self/fd/{file.fileno()}"
        self._directory = directory
        self._hidden = hidden

    @classmethod
    async def create(cls, directory: str) -> NewFile:
        """A new, empty file in `directory`, mode 0600. Raises IoError naming the directory."""
        making = running_pool().submit(Lane(), cls._create, directory)
        try:
            return await making
        except asyncio.CancelledError:
            if making.exception() is None:  # a cancel is told once the thread has ended: nobody else knows the file
                await making.result().give_up()
                await making.result().storage.close()
            raise

    @classmethod
    def _create(cls, directory: str) -> NewFile:
        try:
            file, hidden = open_unnamed(directory), None
            if file is None:
                hidden = _hidden_name(directory)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
                file = io.FileIO(os.open(hidden, flags, 0o600), "rb+")
        except OSError as error:
            raise IoError(error.errno or errno.EIO, directory, "create a file") from error
        return cls(file, directory, hidden)

    async def publish(self, path: str, *, replace: bool = False) -> None:
        """Makes the file and its name `path`, in the directory it was created in, durable.

        With `replace` it takes the place, the mode and the owner of a file there. Raises IoError: EEXIST where there is
        one and `replace` was not asked for; the file then has no name, and can be published under another.
        """
        await self.storage.sync()
        await running_pool().submit(Lane(), self._publish, path, replace)

    def _publish(self, path: str, replace: bool) -> None:
        try:
            if replace:
                self._replace(path)
            elif self._hidden is None:
                _link_unnamed(self.path, path)
            else:
                _move(self._hidden, path)
                self._hidden = None
            sync_directory(self._directory)
        except OSError as error:
            raise IoError(error.errno or errno.EIO, path, "create") from error

    def _replace(self, path: str) -> None:
        hidden = self._hidden
        if hidden is None:
            self._hidden = hidden = _hidden_name(self._directory)
            _link_unnamed(self.path, hidden)
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(path)
            with contextlib.suppress(PermissionError):  # only root may give files away
                os.chown(hidden, old.st_uid, old.st_gid)
            os.chmod(hidden, old.st_mode & 0o777)
        os.rename(hidden, path)
        self._hidden = None

    async def give_up(self) -> None:
        """Removes the hidden name, if the file has one still. Nothing to do once it is published."""
        hidden, self._hidden = self._hidden, None
        if hidden is not None:
            await running_pool().submit(Lane(), _remove, hidden)


@contextlib.asynccontextmanager
async def made_directories(path: str) -> AsyncIterator[None]:
    """Makes `path` a directory, with its parents, each durable. Raises IoError naming what cannot be made.

    If what is done inside fails, those that were made go again, unless there is something in them.
    """
    made: list[str] = []
    try:
        await running_pool().submit(Lane(), _make_directories, path, made)
        yield
    except BaseException:
        await running_pool().submit(Lane(), _remove_empty, made)
        raise


async def forget_cached(path: str) -> None:
    """Drops what the page cache holds of a file that was synced, so that the next reads come from the device."""
    await running_pool().submit(Lane(), _forget_cached, path)


def _hidden_name(directory: str) -> str:
    return os.path.join(directory, f".fleecer-{secrets.token_hex(8)}.partial")


def _link_unnamed(proc_path: str, path: str) -> None:
    # A directory descriptor makes os.link use linkat(2) with AT_SYMLINK_FOLLOW, which the link in /proc needs.
    directory = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.link(proc_path, path, src_dir_fd=directory, follow_symlinks=True)
    finally:
        os.close(directory)


def _move(hidden: str, path: str) -> None:
    """Renames, but never over anything: by a link, or by renameat2(2) where the file system has no links."""
    try:
        os.link(hidden, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_no_replace(hidden, path)
    else:
        os.unlink(hidden)


def _rename_no_replace(old: str, new: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _make_directories(path: str, into: list[str]) -> None:
    """Notes each that it makes in `into`, the outermost first."""
    path = os.path.abspath(path)
    missing: list[str] = []
    while not os.path.isdir(path) and path != os.path.dirname(path):
        missing.append(path)
        path = os.path.dirname(path)
    for made in reversed(missing):
        try:
            try:
                os.mkdir(made)
                into.append(made)
            except FileExistsError:
                if not os.path.isdir(made):
                    raise
            sync_directory(os.path.dirname(made))
        except OSError as error:
            in_the_way = "a file of that name is there" if isinstance(error, FileExistsError) else ""
            raise IoError(error.errno or errno.EIO, made, "make directory", detail=in_the_way) from error


def _remove_empty(directories: list[str]) -> None:
    with contextlib.suppress(OSError):
        for path in reversed(directories):
            os.rmdir(path)


def _forget_cached(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, "read back") from error
