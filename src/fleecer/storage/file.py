"""Regular files and block devices, through the page cache.

Reads of cached pages and quick writes happen on the event loop; whatever would block goes to the pool (pool.py), or,
where that can be done, reads to the kernel's ring (ring.py) and syncs to its workers (syncs.py).

Invariants:
- Only regular files and block devices are opened; anything else is refused before it is touched.
- An inline read uses RWF_NOWAIT, or is on a file system in memory. A short inline read is not the end of the file: it
  is read again.
- Buffers are made for each read and belong to the caller.
- `size` never exceeds what was written or found; the file may be longer only while a write past the end is in flight.
  So if it is shorter, somebody else has cut it: what was there is an error to read, never zeroes.
- The descriptor is closed once, by `close`, or by the garbage collector with a ResourceWarning.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import io
import os
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence

from fleecer import spares
from fleecer.errors import CannotOpen, IoError, UsageError, quoted
from fleecer.ranges import Buffer, align_down, align_up
from fleecer.storage import fallocate
from fleecer.storage.api import Ended, ReadEnded, StorageLimits
from fleecer.storage.inline import InlineWrites, LongWrites
from fleecer.storage.lanes import Lane, Result, settle, tell
from fleecer.storage.locks import lock_image
from fleecer.storage.paths import identity_of, open_unnamed, sync_directory
from fleecer.storage.pool import running_pool
from fleecer.storage.ring import Disk, Ring
from fleecer.units import KiB, MiB

INLINE_MAX_BYTES = 1 * MiB
"""Longer reads and writes go to the pool: copying them would hold up the event loop."""

LONG_BYTES = 512 * KiB
"""Longer writes may go to threads beside the event loop, where that pays (`LongWrites`). Shorter ones never do."""

RING_MAX_BYTES = 64 * KiB
"""Longer reads go to threads: the ring copies on the event loop's own, and piece by piece as the disk delivers."""

SKIPS_MAX = 16
"""Of so many reads that were not cached in a row, one is tried inline."""

EXTENTS_MAX = 256
"""Runs told in one answer of `extents`."""

_BLKSSZGET = 0x1268  # linux/fs.h
_NO_DISK = Disk()
_CLOSED = 0x7FFFFFFF  # a descriptor that nobody has: the kernel answers EBADF
_FILE_TYPES = {
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class FileStorage:
    """An open regular file or block device; implements `Storage`. Made by the functions at the end of this module."""

    __slots__ = (
        "_device",
        "_disk",
        "_fd",
        "_file",
        "_has_missed",
        "_inline_read_flags",
        "_inline_writes",
        "_is_in_memory",
        "_lane",
        "_long_writes",
        "_modes",
        "_reading",
        "_ring",
        "_sector_bytes",
        "_skips",
        "_skips_next",
        "_sync_lane",
        "_syncing",
        "_unsynced_directory",
        "identity",
        "is_block_device",
        "limits",
        "name",
        "read_only",
        "size",
    )

    def __init__(self, file: io.FileIO, name: str, *, read_only: bool, created_in: str | None = None) -> None:
        """Takes over `file`. `created_in` is the directory that must be synced for the file to survive a power cut."""
        self._file = file
        self._fd = fd = file.fileno()
        self.name = name
        self.read_only = read_only
        status = os.fstat(fd)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        self.identity = identity_of(status)
        self.size = os.lseek(fd, 0, os.SEEK_END) if self.is_block_device else status.st_size
        self._sector_bytes = 1
        if self.is_block_device:
            self._sector_bytes = struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        punches = not read_only and (self.is_block_device or fallocate.can_punch(fd, self.size))
        self.limits = StorageLimits(
            zero_is_fast=punches and not self.is_block_device,
            can_discard=punches,
            growable=not read_only and not self.is_block_device,
            reads_zero_when_new=not self.is_block_device,
        )
        self._modes = fallocate.Modes()
        # A device's own file lies in memory, what it leads to does not.
        self._is_in_memory = not self.is_block_device and fallocate.is_in_memory(fd)
        self._unsynced_directory = created_in
        # preadv's flags for reads on the event loop; None where those could block.
        self._inline_read_flags: int | None = os.RWF_NOWAIT
        # Reads that are not tried inline, of those to come. One that was tried in vain goes through several hands on
        # its way to `pread`, and none needs to try again; and where the ring reads, nothing is cheaper than not to try.
        self._skips = 0
        self._skips_next = 1
        self._has_missed = False  # an inline read that could have been one: the file can be read with RWF_NOWAIT
        self._device = status.st_rdev if self.is_block_device else status.st_dev
        self._disk = _NO_DISK  # until a read may have to wait for one
        self._ring: Ring | None = None  # the running loop's, once there is one and we can use it
        self._inline_writes = InlineWrites()
        self._long_writes = LongWrites()
        self._reading = 0
        # Syncs are counted apart, so that reads need not queue behind them.
        self._lane = Lane()
        self._sync_lane = Lane(1)
        self._syncing = 0  # by the kernel's workers

    def __repr__(self) -> str:
        return f"FileStorage({quoted(self.name)})"

    def directory(self) -> str:
        """Where the file is now, whatever links led to it or was renamed since. Asks its file system nothing."""
        return os.path.dirname(os.readlink(f"/proc/self/fd/{self._fd}"))

    # On the event loop.

    @property
    def reads_wait(self) -> bool:
        """See `Storage.reads_wait`."""
        return self._skips > 0 or not self._disk.may_try

    def try_pread_into(self, offset: int, into: memoryview) -> bool:
        """See `Storage.try_pread_into`."""
        flags = self._inline_read_flags
        length = len(into)
        if flags is None or self._skips or length > INLINE_MAX_BYTES or not self._disk.may_try:
            return False
        try:
            if os.preadv(self._fd, (into,), offset, flags) == length:
                self._skips_next = 1
                return True
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP and flags:
                self._inline_read_flags = 0 if self._is_in_memory else None
                return self.try_pread_into(offset, into)
        # Not cached, only partly cached, past the end, or failing: `pread` finds out which.
        self._skips = self._skips_next
        self._has_missed = flags != 0
        self._disk.missed()
        return False

    def try_pwrite(self, offset: int, data: Buffer) -> bool:
        """See `Storage.try_pwrite`."""
        policy = self._inline_writes
        begun_s = policy.clock()
        length = len(data)
        if begun_s < policy.resume_at_s or (length > LONG_BYTES and self._goes_to_a_thread(length)):
            return False
        if policy.quick_to_go:
            policy.look_closely()
        try:
            count = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise self._failed(error, "write", offset, length) from error
        now_s = policy.clock()
        if policy.quick_to_go or now_s - begun_s > policy.SLOW_S:
            policy.ended(begun_s, now_s)
        if count != length:
            try:
                self._pwrite(offset, data, count)
            except IoError:
                self._look_at_size()
                raise
        if offset + length > self.size:
            self.size = offset + length
        return True

    def _goes_to_a_thread(self, length: int) -> bool:
        return length > INLINE_MAX_BYTES or self._long_writes.goes_beside()

    # Through the ring or the pool.

    def begin_pread(self, offset: int, length: int, ended: ReadEnded) -> bool:
        """See `Storage.begin_pread`: where the ring reads."""
        ring = self._ring or self._find_ring()
        if ring is None or length > RING_MAX_BYTES:
            return False
        if self._skips:
            self._skips -= 1
        if self._skips_next < SKIPS_MAX:
            self._skips_next *= 2
        self._reading += 1
        self._disk.begin()
        data = bytearray(length)
        ring.read(self._disk, self._fd, data, offset, functools.partial(self._ring_ended, data, offset, ended))
        return True

    def _find_ring(self) -> Ring | None:
        pool = running_pool()
        self._disk = pool.disk(self._device)
        if self._has_missed:
            self._ring = pool.ring()
        return self._ring

    def _ring_ended(self, data: bytearray, offset: int, ended: ReadEnded, count: int) -> None:
        if count == len(data):
            self._reading -= 1
            self._disk.end()
            ended(data, None)
        else:  # past the end, or failing: a thread finds out which
            future = running_pool().submit(self._lane, self._pread, offset, len(data), self.size)
            future.add_done_callback(functools.partial(self._thread_ended, ended))

    def _thread_ended(self, ended: ReadEnded, read: asyncio.Future[Buffer]) -> None:
        self._end_read()
        tell(ended, read)

    def _end_read(self) -> None:
        self._reading -= 1
        self._disk.end()

    async def pread(self, offset: int, length: int) -> Buffer:
        """See `Storage.pread`."""
        if self._ring or self._find_ring():
            result = Result[Buffer](loop=asyncio.get_running_loop())
            if self.begin_pread(offset, length, functools.partial(settle, result)):
                return await result
        if self._skips:
            self._skips -= 1
        self._reading += 1
        self._disk.begin()
        try:
            return await running_pool().submit(self._lane, self._pread, offset, length, self.size)
        finally:
            self._end_read()

    async def pwrite(self, offset: int, data: Buffer) -> None:
        """See `Storage.pwrite`."""
        is_long = len(data) > LONG_BYTES
        if is_long:
            self._long_writes.begin()
        try:
            await running_pool().submit(self._lane, self._pwrite, offset, data)
        except IoError:
            self._look_at_size()
            raise
        finally:
            if is_long:
                self._long_writes.end()
        self.size = max(self.size, offset + len(data))

    async def zero(self, offset: int, length: int, unmap: bool) -> None:
        """See `Storage.zero`."""
        await running_pool().submit(self._lane, self._zero, offset, length, unmap, self.size)
        self.size = max(self.size, offset + length)

    async def discard(self, offset: int, length: int) -> None:
        """See `Storage.discard`."""
        if self.limits.can_discard:
            await running_pool().submit(self._lane, self._discard, offset, length)

    async def sync(self) -> None:
        """See `Storage.sync`."""
        done = Result[None](loop=asyncio.get_running_loop())
        if self.begin_sync(functools.partial(settle, done, None)):
            await done
        else:
            await running_pool().submit(self._sync_lane, self._sync)

    def begin_sync(self, ended: Ended) -> bool:
        """See `Storage.begin_sync`: where the kernel's workers sync (syncs.py), and a name need not be synced too."""
        if self._unsynced_directory is not None:
            return False
        if self._is_in_memory:
            self._sync()  # there is nothing to wait for
            ended(None)
            return True
        syncs = running_pool().syncs()
        if syncs is None or not syncs.begin(self._fd, functools.partial(self._sync_ended, ended)):
            return False
        self._syncing += 1
        return True

    def _sync_ended(self, ended: Ended, result: int) -> None:
        self._syncing -= 1
        ended(self._failed(OSError(-result, os.strerror(-result)), "flush", 0, 0) if result else None)

    async def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """See `Storage.extents`."""
        if self.is_block_device:
            return [(length, True)]
        return await running_pool().submit(self._lane, self._extents, offset, length, self.size)

    async def truncate(self, size: int) -> None:
        """See `Storage.truncate`. Raises IoError (ENOTSUP) for a block device."""
        if self.is_block_device:
            raise IoError(errno.ENOTSUP, self.name, "resize", detail="a block device cannot be resized from here")
        await running_pool().submit(self._lane, self._truncate, size)
        self.size = size

    async def close(self) -> None:
        """See `Storage.close`."""
        if self._fd == _CLOSED:
            return
        running = self._reading + self._lane.running + self._sync_lane.running + self._syncing
        assert not running, f"{self!r} was closed with work in flight"
        self._fd = _CLOSED
        try:
            await running_pool().submit(self._lane, self._file.close)
        except OSError as error:
            raise self._failed(error, "close", 0, 0) from error

    # In a thread.

    def _failed(self, error: OSError, operation: str, offset: int, length: int) -> IoError:
        return IoError(error.errno or errno.EIO, self.name, operation, offset, length)

    def _cut_short(self, operation: str, offset: int, length: int, end: int, size: int) -> IoError:
        detail = f"the file ends at byte {end} but had {size} bytes: it was cut short; restore it from a backup"
        return IoError(errno.EIO, self.name, operation, offset, length, detail)

    def _pread(self, offset: int, length: int, size: int) -> Buffer:
        # `size` is that of the moment of asking: what others add since does not make this read a short one.
        data = spares.take(length)
        view = memoryview(data)
        done = 0
        try:
            while done < length:
                count = os.preadv(self._fd, (view[done:],), offset + done)
                if not count:
                    if offset + done < size:
                        end = os.lseek(self._fd, 0, os.SEEK_END)
                        raise self._cut_short("read", offset, length, end, size)
                    view[done:] = bytes(length - done)  # past the end, where all is zero
                    break
                done += count
        except OSError as error:
            raise self._failed(error, "read", offset, length) from error
        return data

    def _look_at_size(self) -> None:
        """A write failed half-way: what it left past the end is there from now on, not when the file grows next."""
        with contextlib.suppress(OSError):
            self.size = max(self.size, os.fstat(self._fd).st_size)

    def _pwrite(self, offset: int, data: Buffer, done: int = 0) -> None:
        view = memoryview(data)
        try:
            while done < len(view):
                count = os.pwrite(self._fd, view[done:], offset + done)
                if not count:
                    raise OSError(errno.EIO, "the kernel wrote nothing")
                done += count
        except OSError as error:
            raise self._failed(error, "write", offset, len(view)) from error

    def _zero(self, offset: int, length: int, unmap: bool, size: int) -> None:
        end = offset + length
        start, stop = align_up(offset, self._sector_bytes), align_down(end, self._sector_bytes)
        try:
            if end > size and not self.is_block_device:
                # One byte inside our own range extends the file; ftruncate could shorten it under another's write.
                fallocate.write_zeroes(self._fd, end - 1, 1)
            if start >= stop:
                fallocate.write_zeroes(self._fd, offset, length)
                return
            fallocate.write_zeroes(self._fd, offset, start - offset)
            fallocate.zero_range(self._fd, self._modes, start, stop - start, unmap=unmap)
            fallocate.write_zeroes(self._fd, stop, end - stop)
        except OSError as error:
            raise self._failed(error, "write zeroes", offset, length) from error

    def _discard(self, offset: int, length: int) -> None:
        start = align_up(offset, self._sector_bytes)
        stop = align_down(offset + length, self._sector_bytes)
        try:
            if start < stop:
                self._modes.attempt(self._fd, fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE, start, stop - start)
        except OSError as error:
            raise self._failed(error, "discard", offset, length) from error

    def _sync(self) -> None:
        try:
            if self._unsynced_directory is not None:
                # A new file survives a power cut only with its name.
                os.fsync(self._fd)
                sync_directory(self._unsynced_directory)
                self._unsynced_directory = None
            else:
                os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error, "flush", 0, 0) from error

    def _extents(self, offset: int, length: int, size: int) -> list[tuple[int, bool]]:
        end = offset + length
        runs: list[tuple[int, bool]] = []
        position = offset
        try:
            while position < end and len(runs) < EXTENTS_MAX:
                data = self._seek(position, os.SEEK_DATA, default=end)
                if data == end and (file_end := os.lseek(self._fd, 0, os.SEEK_END)) < min(end, size):
                    raise self._cut_short("block status", offset, length, file_end, size)
                if data > position:
                    runs.append((min(data, end) - position, False))
                    position = data
                    continue
                # What was data an instant ago may have been punched since; a run is at least one byte all the same.
                hole = max(self._seek(position, os.SEEK_HOLE, default=end), position + 1)
                runs.append((hole - position, True))
                position = hole
        except OSError as error:
            raise self._failed(error, "block status", offset, length) from error
        return runs

    def _seek(self, offset: int, whence: int, default: int) -> int:
        """lseek(2) to data or a hole; `default` where there is none before the end of the file."""
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return default
            raise

    def _truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._failed(error, f"resize to {size} bytes", 0, 0) from error


async def open_file(
    path: str, *, read_only: bool = False, locking: bool = True, force_share: bool = False
) -> FileStorage:
    """Opens an existing image. The caller closes it.

    With `locking` it is locked against other processes by QEMU's rules; `force_share` lets a reader put up with
    writers. Raises UsageError for what is neither a regular file nor a block device, IoError where it cannot be opened,
    PermissionConflict where the locks forbid it. The open itself runs in the pool: a dead file server stalls nobody.
    """
    if force_share and not read_only:
        raise UsageError(f"image {quoted(path)}: force-share is for reading only; open it read-only")
    return await running_pool().submit(Lane(), _open, path, read_only, locking, force_share)


async def create_file(
    path: str, *, size: int = 0, exclusive: bool = True, mode: int = 0o600, locking: bool = True
) -> FileStorage:
    """Makes a regular file of `size` bytes that read as zero, and opens it for writing; else as `open_file`.

    With `exclusive` an existing file is refused (IoError, EEXIST); without, its content goes, once its locks are ours.
    The name is durable after the first `sync`. After an error no new file is left behind.
    """
    return await running_pool().submit(Lane(), _create, path, size, exclusive, mode, locking)


def open_unlinked(directory: str, sizes: Sequence[int]) -> asyncio.Future[list[FileStorage]]:
    """New files without names in `directory`, each of so many zeroes; their space is free again once they are closed.

    They are being made on return, and the future cannot be cancelled. Raises IoError where one cannot be made; then
    there is none.
    """
    return running_pool().submit(Lane(), _open_unlinked, directory, sizes)


def _open(path: str, read_only: bool, locking: bool, force_share: bool) -> FileStorage:
    try:
        # Some devices act on being opened, so the type is looked at before, and on the descriptor again.
        _check_type(path, os.stat(path).st_mode)
        file = _open_raw(path, os.O_RDONLY if read_only else os.O_RDWR)
    except OSError as error:
        raise CannotOpen(error.errno or errno.EIO, path, _why_not_opened(error, path, read_only)) from error
    except ValueError:
        raise UsageError(f"image name {quoted(path)} has a NUL in it, which no file name can have") from None
    with _closing_on_error(file):
        _check_type(path, os.fstat(file.fileno()).st_mode)
        os.set_blocking(file.fileno(), True)
        if locking:
            lock_image(file.fileno(), path, writable=not read_only, force_share=force_share)
        return FileStorage(file, path, read_only=read_only)


def _why_not_opened(error: OSError, path: str, read_only: bool) -> str:
    """What follows the image's name in the message about a failed open: what is the matter, and what to do."""
    match error.errno:
        case errno.ENOENT:
            return "does not exist"
        case errno.ENOTDIR:
            return "does not exist: what its path has for a directory is none"
        case errno.ELOOP:
            return "is a symbolic link that leads to itself"
        case errno.ENAMETOOLONG:
            return "does not exist: no name may be longer than 255 bytes, no path than 4095"
        case errno.EROFS:
            return "is on a read-only file system; open it with --read-only (read-only=on)"
        case errno.EACCES | errno.EPERM if not read_only and os.access(path, os.R_OK):
            return "may be read but not written to; open it with --read-only (read-only=on), or change its mode"
        case errno.EACCES | errno.EPERM:
            return "may not be opened by this user; see the modes of it and of the directories that lead to it"
    return f"cannot be opened: {error.strerror or error}"


def _create(path: str, size: int, exclusive: bool, mode: int, locking: bool) -> FileStorage:
    flags = os.O_RDWR | os.O_CREAT
    is_new = True
    try:
        try:
            file = _open_raw(path, flags | os.O_EXCL, mode)
        except FileExistsError:
            if exclusive:
                raise
            _check_type(path, os.stat(path).st_mode, _REGULAR_ONLY)
            file = _open_raw(path, flags, mode)
            is_new = False
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, "create") from error
    try:
        with _closing_on_error(file):
            _check_type(path, os.fstat(file.fileno()).st_mode, _REGULAR_ONLY)
            if locking:
                lock_image(file.fileno(), path, writable=True)
            _resize(file, path, 0)  # what was there goes
            _resize(file, path, size)
            return FileStorage(file, path, read_only=False, created_in=os.path.dirname(path) or ".")
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


def _resize(file: io.FileIO, path: str, size: int) -> None:
    try:
        os.ftruncate(file.fileno(), size)
    except OSError as error:
        raise IoError(error.errno or errno.EIO, path, f"resize to {size} bytes") from error


def _open_unlinked(directory: str, sizes: Sequence[int]) -> list[FileStorage]:
    path = os.path.join(directory, "(scratch)")
    opened: list[FileStorage] = []
    with contextlib.ExitStack() as unfinished:
        for size in sizes:
            file = _create_unlinked(directory)
            unfinished.callback(file.close)
            _resize(file, path, size)
            opened.append(FileStorage(file, path, read_only=False))
        unfinished.pop_all()
    return opened


def _create_unlinked(directory: str) -> io.FileIO:
    try:
        file = open_unnamed(directory)
        if file is None:
            fd, path = tempfile.mkstemp(prefix=".fleecer-", dir=directory)
            os.unlink(path)
            file = io.FileIO(fd, "rb+")
    except OSError as error:
        raise IoError(error.errno or errno.EIO, directory, "create a scratch file") from error
    return file


def _open_raw(path: str, flags: int, mode: int = 0o600) -> io.FileIO:
    """open(2) in a way that cannot hang on a FIFO, in an object that cannot leak the descriptor."""
    flags |= os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    return io.FileIO(path, "rb+" if flags & os.O_RDWR else "rb", opener=lambda name, _: os.open(name, flags, mode))


@contextlib.contextmanager
def _closing_on_error(file: io.FileIO) -> Iterator[None]:
    try:
        yield
    except BaseException:
        file.close()
        raise


_IMAGE_TYPES = {stat.S_IFREG: "regular files", stat.S_IFBLK: "block devices"}
_REGULAR_ONLY = {stat.S_IFREG: "regular files"}


def _check_type(path: str, mode: int, allowed: dict[int, str] = _IMAGE_TYPES) -> None:
    kind = stat.S_IFMT(mode)
    if kind not in allowed:
        is_now = _FILE_TYPES.get(kind, "of an unknown type")
        raise UsageError(f"image {quoted(path)} is {is_now}; only {' and '.join(allowed.values())} will do")
