"""Copy-before-write: keeps the past of one disk for any number of snapshots, with one copy of each changed cluster.

A *snapshot* is an instant and a scratch (its target) to which old data goes. Snapshots are kept in order of time. A
cluster changed after snapshot s and before the next one is copied once, into the scratch of the newest snapshot that is
read then; every older snapshot that has no copy of its own finds it there. So snapshot s reads cluster c

    from the first scratch, at or after s in time, that holds c;  if none does, from the disk itself, frozen.

A guest's change of a range goes like this (`preserve`): the old data of each cluster not yet settled is copied; it is
marked done; overlapping reads of the disk by snapshots, *frozen reads*, are waited for; the change starts.

Invariants:
- Old data is in the scratch and marked done before the first changed byte reaches the disk.
- Done is set before frozen reads are waited for. A new reader finds it done and leaves the disk alone, so it ends.
- Choosing between scratch and disk, and freezing the range of the disk, happen with no await between.
- A failed copy is unmarked before its waiters wake, and they look again.
- A snapshot that broke or ended never answers a read again: that is looked at after every read, before its data is
  used.
- A copy given up (timed out, or nobody needs it any more) never marks anything done.
- Old data in memory is bounded, whatever a change spans, and so is the time for which the loop is held up by it.
- A snapshot is taken only while every edge through which the disk is changed is drained.
- A failure here fails no guest's change, unless a snapshot that it concerns says so (`on_error`): then the change
  fails, and every snapshot is whole. Otherwise those concerned break: where the disk could not be read, all that need
  the copy; where a scratch could not be written, the one whose scratch it is, and older ones try their own.
- A change waits for a snapshot's sake as long as copies for the change go on to end well, and no longer than that
  snapshot's `timeout_s` after the last. Where it is another's scratch that holds a copy up, that one breaks when it is
  late, and the copy is made anew, for which the others have all their time.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
from collections.abc import Callable
from typing import Literal

from fleecer import eager, spares
from fleecer.block.bitmap import Bitmap
from fleecer.block.edge import Edge
from fleecer.block.inflight import Claim, InFlight
from fleecer.errors import FleecerError, IoError, SnapshotBroken, UsageError, told
from fleecer.ranges import Buffer, WriteAtOnce, align_up, is_power_of_two, is_zero
from fleecer.units import KiB, MiB
from fleecer.waiters import done_in_time

OnError = Literal["break-snapshot", "break-guest-write"]

CLUSTER_SIZE_BYTES = 64 * KiB
"""The unit of copying where QEMU's rules say so, for its drivers; else see `natural_cluster_size`."""
CLUSTER_SIZE_MIN = 512
CLUSTER_SIZE_MAX = 64 * MiB
TIMEOUT_S = 15.0
"""How long a guest's write waits for a copy unless told otherwise: well below the 30 s after which guests give up."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLUSTERS_MAX = 1 << 28
"""As many as a disk has, if larger clusters can help: then a bitmap of which all is touched has 32 MiB."""
_AHEAD_BYTES = 64 * KiB
"""Changes in a row are copied for in pieces of this length."""
COPY_MAX_BYTES = 1 * MiB
COPIES_MAX_BYTES = 8 * MiB
"""Old data in memory at once, besides one copy for each change: one discard may span gigabytes."""
FREEZE_MAX_BYTES = 1 * MiB
"""Longest piece of the disk a snapshot read holds frozen at once: a write never waits for more than that."""


def natural_cluster_size(disk_bytes: int, block_bytes: int) -> int:
    """The unit of copying for a disk of some size, into a scratch whose file system has blocks of `block_bytes`.

    It is a block, 4 KiB mostly: what a guest changes is what is copied, and what a scratch needs. On a large disk it is
    as much more as keeps the bitmaps small, and never more than 64 KiB for either's sake.
    """
    size = 4 * KiB
    while size < CLUSTER_SIZE_BYTES and (size < block_bytes or disk_bytes > size * _CLUSTERS_MAX):
        size *= 2
    return size


class Snapshot:
    """One instant of the disk. Made by `Copier.take`, ended by `Copier.retire`.

    `broken` is the first failure, or None while every read is good; `revoked` the clusters whose reader gave them back.
    """

    __slots__ = (
        "blank",
        "broken",
        "done",
        "fresh",
        "frozen",
        "living",
        "name",
        "on_broken",
        "on_error",
        "revoked",
        "scratch",
        "serialising",
        "timeout_s",
    )

    def __init__(
        self, name: str, scratch: Edge, *, fresh: bool, serialising: bool, on_error: OnError, timeout_s: float
    ) -> None:
        self.name = name
        self.scratch = scratch
        self.fresh = fresh
        self.serialising = serialising
        self.on_error = on_error
        self.timeout_s = timeout_s
        self.done = Bitmap()
        self.blank = Bitmap()  # of these, the clusters that were all zeroes
        self.revoked: Bitmap | None = None
        self.frozen = InFlight()
        self.living = True
        self.broken: SnapshotBroken | None = None
        self.on_broken: Callable[[Snapshot], None] | None = None

    @property
    def readable(self) -> bool:
        """Whether it has neither broken nor ended."""
        return self.living and self.broken is None

    def hold(self, first: int, end: int, *, blank: bool) -> None:
        """The scratch has these clusters now; `blank` if they are zeroes."""
        if blank:
            self.blank.set(first, end)
        self.done.set(first, end)

    def check(self) -> None:
        """Raises if the snapshot broke or has ended: after each read, before its data is used."""
        if self.broken is not None:
            raise SnapshotBroken(self.name, self.broken.cause)
        if not self.living:
            raise SnapshotBroken(self.name, "it has ended")


class _Copy:
    """One run of clusters on its way into a scratch.

    `is_read` says that only the scratch is still to take it; `over_at_s` when it ended well, in the loop's time, or was
    given up for the scratch's slowness; `fails_change` that its error is that of the guest's change.
    """

    __slots__ = ("end", "error", "fails_change", "given_up", "is_read", "over_at_s", "snapshot", "start", "waiters")

    def __init__(self, start: int, end: int, snapshot: Snapshot) -> None:
        self.start = start
        self.end = end
        self.snapshot = snapshot
        self.error: FleecerError | None = None
        self.fails_change = False
        self.given_up = False
        self.is_read = False
        self.over_at_s = 0.0
        self.waiters: list[asyncio.Future[bool]] = []

    def ended(self) -> asyncio.Future[bool]:
        """Becomes True when this copy has ended, one way or the other."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        return waiter

    def wake(self) -> None:
        """Lets everyone who waited for the end of this copy look again."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(True)


class Copier:
    """The snapshots of one disk, and the copying for them. `source` is the disk below the filter.

    `cluster_size_bytes` is the unit of copying, a power of two; UsageError for what is none, or out of all proportion.
    `on_error` and `timeout_s` are those of snapshots that bring none of their own; see `take`. `freeze=False` leaves
    frozen reads unprotected, for tests that must show what goes wrong without.
    """

    def __init__(
        self,
        source: Edge,
        *,
        cluster_size_bytes: int = CLUSTER_SIZE_BYTES,
        on_error: OnError = "break-snapshot",
        timeout_s: float = TIMEOUT_S,
        freeze: bool = True,
    ) -> None:
        if not is_power_of_two(cluster_size_bytes) or not CLUSTER_SIZE_MIN <= cluster_size_bytes <= CLUSTER_SIZE_MAX:
            raise UsageError(
                f"cluster size {cluster_size_bytes} is no power of two from {CLUSTER_SIZE_MIN} to {CLUSTER_SIZE_MAX}"
            )
        self.source = source
        self.cluster_size_bytes = cluster_size_bytes
        self._on_error = on_error
        self._timeout_s = timeout_s
        self._freeze = freeze
        self._snapshots: list[Snapshot] = []  # in order of time; retired ones stay while an older one may read them
        self._newest: Snapshot | None = None  # the newest one still read: copies go to its scratch
        self._settled = Bitmap()  # clusters that need no copy: preserved for, or not wanted by, everyone
        self._copies: list[_Copy] = []
        self._ahead_clusters = max(1, _AHEAD_BYTES // cluster_size_bytes)
        self._copied_to = -1  # behind the last cluster that was copied at once

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """Every snapshot whose scratch is still held, oldest first."""
        return tuple(self._snapshots)

    def preserved_bytes(self, snapshot: Snapshot) -> int:
        """How much old data is kept for this snapshot and older ones, but for no later one that has not ended.

        That is what its own scratch holds, and those of ended ones right after it: with nobody else to count for them,
        room would be taken that shows nowhere. 0 for one that has ended.
        """
        if not snapshot.living:
            return 0
        later = self._snapshots[self._snapshots.index(snapshot) + 1 :]
        ended = itertools.takewhile(lambda holder: not holder.living, later)
        return sum(holder.done.count() for holder in (snapshot, *ended)) * self.cluster_size_bytes

    # Taking and retiring: no await in either, so a cut over several disks is one step.

    def take(
        self,
        name: str,
        scratch: Edge,
        *,
        fresh: bool = False,
        serialising: bool = False,
        on_error: OnError | None = None,
        timeout_s: float | None = None,
    ) -> Snapshot:
        """A snapshot of this very moment. Call it only while everything that changes the disk is drained.

        `scratch` must be at least as large as the disk. `fresh` says that it was never written and reads as zeroes, so
        that zeroes need not be copied. `serialising` makes copies and overlapping requests on the scratch wait for each
        other: needed when somebody reads the disk through the scratch, being in its backing chain (QEMU's old scheme).
        `on_error` says what gives way where old data that it needs cannot be kept; `timeout_s` how long a change waits
        for its sake without any copy for that change ending well, 0 for no bound. None: as the copier's.
        """
        snapshot = Snapshot(
            name,
            scratch,
            fresh=fresh,
            serialising=serialising,
            on_error=on_error or self._on_error,
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
        )
        self._snapshots.append(snapshot)
        self._look_again()
        return snapshot

    def retire(self, snapshot: Snapshot) -> list[Edge]:
        """Ends a snapshot: nobody reads it any more. Returns the scratch edges that nothing needs now.

        The caller drains and detaches those; copies on their way into them end, and mark nothing.
        """
        snapshot.living = False
        kept: list[Snapshot] = []
        for old in self._snapshots:
            if old.living or (kept and old.done.any()):  # else nothing in it is for an older one
                kept.append(old)
        dropped = [old for old in self._snapshots if old not in kept]
        self._snapshots = kept
        self._look_again()
        self._give_up_useless(dropped)
        return [old.scratch for old in dropped]

    def break_snapshot(self, snapshot: Snapshot, cause: str) -> None:
        """Gives a snapshot up. Its reads fail from now on, those in flight included; the disk is not affected."""
        if not snapshot.readable:
            return
        snapshot.broken = SnapshotBroken(snapshot.name, cause)
        self._look_again()
        self._give_up_useless([])
        if snapshot.on_broken is not None:
            snapshot.on_broken(snapshot)

    def _look_again(self) -> None:
        """Finds anew which snapshot copies go to, and which clusters need none."""
        readable = self._readable()
        self._newest = readable[-1] if readable else None
        self._settled = Bitmap()
        if self._newest is None:
            return
        serving = self._snapshots[self._snapshots.index(self._newest) :]
        for holder in serving:
            self._settled.update(holder.done)
        if self._newest.revoked is not None:
            self._settled.update(self._unwanted(self._newest.revoked, readable[:-1]))
        for copy in self._copies:
            if copy.snapshot in serving:  # one for an older snapshot does not help this one
                self._settled.set(copy.start, copy.end)

    def clusters(self, offset: int, length: int) -> tuple[int, int]:
        """The clusters that a range of bytes touches: the first, and the one after the last."""
        return offset // self.cluster_size_bytes, (offset + length - 1) // self.cluster_size_bytes + 1

    def _unwanted(self, revoked: Bitmap, older: list[Snapshot]) -> Bitmap:
        """Those of the `revoked` clusters that no `older` snapshot would read from the disk either."""
        unwanted = Bitmap()
        unwanted.update(revoked)
        for first, end, is_revoked in revoked.runs(0, -(-self.source.size // self.cluster_size_bytes)):
            for snapshot in older if is_revoked else ():
                for holder, start, stop in self._runs(snapshot, first, end):
                    if holder is None:
                        unwanted.clear(start, stop)
        return unwanted

    # The guest's side.

    def must_preserve(self, offset: int, length: int) -> bool:
        """Whether a change of this range has to go through `preserve` first. Never waits."""
        if self._newest is None and not self._copies:
            return False
        first, end = self.clusters(offset, length)
        return not self._is_settled(first, end) or self._is_busy(first, end)

    def writer(self, write: WriteAtOnce) -> WriteAtOnce:
        """What writes by `write` what can be written without a wait; see `Node.writer`.

        Before each write its range is preserved. Most of the time nothing is under way that could be in a change's way,
        neither a copy nor a read for a snapshot, nor will it be while what is returned is good.
        """
        if self._copies or any(len(snapshot.frozen) for snapshot in self._snapshots):
            return functools.partial(self._write_preserved, write)
        return functools.partial(self._write_settled, write) if self._newest is not None else write

    def _write_preserved(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        return self.preserved_at_once(offset, len(data)) and write(offset, data)

    def _write_settled(self, write: WriteAtOnce, offset: int, data: Buffer) -> bool:
        size = self.cluster_size_bytes
        cluster = offset // size
        is_settled = self._settled[cluster] and offset + len(data) <= (cluster + 1) * size
        return (is_settled or self.preserved_at_once(offset, len(data))) and write(offset, data)

    def preserved_at_once(self, offset: int, length: int) -> bool:
        """As `preserve`, if that takes no wait; False, with nothing marked, if it does, or fails: `preserve` will see.

        Where True, the range may be changed now, before anything else can happen.
        """
        if self._newest is None and not self._copies:
            return True
        first, end = self.clusters(offset, length)
        if self._is_busy(first, end):
            return False
        return self._is_settled(first, end) or self._copied_at_once(first, self._end_ahead(first, end))

    def _is_settled(self, first: int, end: int) -> bool:
        return bool(self._settled[first]) if end == first + 1 else self._settled.all(first, end)

    def _end_ahead(self, first: int, end: int) -> int:
        """Up to where to copy for a change: beyond it if it follows the last one, as most likely the next one does."""
        if first == self._copied_to:
            stop = min(align_up(end, self._ahead_clusters), -(-self.source.size // self.cluster_size_bytes))
            if stop > end and not self._is_busy(end, stop):
                return stop
        return end

    def _is_busy(self, first: int, end: int) -> bool:
        """Whether any of these clusters is being copied, or read from the disk by a snapshot."""
        if self._copies and self._under_way(first, end):
            return True
        for snapshot in self._snapshots:
            if len(snapshot.frozen):
                start, length = first * self.cluster_size_bytes, (end - first) * self.cluster_size_bytes
                if snapshot.frozen.overlaps(start, length):
                    return True
        return False

    def _under_way(self, first: int, end: int) -> list[_Copy]:
        """The copies of any of these clusters that have not ended."""
        return [copy for copy in self._copies if copy.start < end and first < copy.end]

    def _copied_at_once(self, first: int, end: int) -> bool:
        newest = self._newest
        if newest is None:
            return True  # nobody wants the old data
        if (end - first) * self.cluster_size_bytes > COPY_MAX_BYTES:
            return False
        for start, stop, settled in list(self._settled.runs(first, end)):
            if not settled:
                try:
                    if not self._copy_at_once(newest, start, stop):
                        return False
                except FleecerError:
                    return False  # `preserve` meets it again, and knows what is to be done
                self._settled.set(start, stop)
        self._copied_to = end
        return True

    def _copy_at_once(self, snapshot: Snapshot, first: int, end: int) -> bool:
        start = first * self.cluster_size_bytes
        data = self.source.try_pread(start, min(end * self.cluster_size_bytes, self.source.size) - start)
        if data is None:
            return False
        blank = is_zero(data)
        done = snapshot.fresh if blank else snapshot.scratch.try_pwrite(start, data, snapshot.serialising)
        spares.give(data)
        if done:
            snapshot.hold(first, end, blank=blank)
        return done

    async def preserve(self, offset: int, length: int) -> None:
        """Returns when the range may be changed: its old data is safe and no snapshot is reading it from the disk.

        Where a snapshot that needs the old data is of "break-guest-write", raises what made a copy fail (ETIMEDOUT if
        it took too long): then nothing may be changed, and every snapshot is whole. Otherwise it never raises.
        """
        first, end = self.clusters(offset, length)
        loop = asyncio.get_running_loop()
        since_s = loop.time()  # when there was progress last
        mine: list[_Copy] = []
        while self._newest is not None or self._copies:
            self._start_copies(first, end, mine)
            for copy in mine:
                if copy.error is not None and copy.fails_change:
                    raise copy.error
                since_s = max(since_s, copy.over_at_s)
            if under_way := self._under_way(first, end):
                now_s = loop.time()
                self._look_for_late(under_way, since_s, now_s, offset, length)
                if under_way[0] in self._copies:
                    await done_in_time(under_way[0].ended(), self._next_deadline(since_s, now_s))
                since_s = max(since_s, *(copy.over_at_s for copy in (*under_way, *mine)))
            elif self._newest is None or self._settled.all(first, end):
                break
            else:
                await asyncio.sleep(0)  # much was copied without a wait: others have their turn before the rest is
        await self._reads_ended(first, end, since_s, offset, length)

    async def _reads_ended(self, first: int, end: int, since_s: float, offset: int, length: int) -> None:
        """Returns when no snapshot is reading these clusters from the disk. One that broke may: nobody uses it."""
        start, stop = first * self.cluster_size_bytes, end * self.cluster_size_bytes
        for snapshot in sorted(self._readable(), key=_gives_way) if self._freeze else ():
            reading = snapshot.frozen.until_clear(start, stop - start)
            deadline = since_s + snapshot.timeout_s if snapshot.timeout_s else None
            if reading is not None and not await done_in_time(reading, deadline):
                self._reader_timed_out(snapshot, offset, length)

    async def copy(self, offset: int, length: int) -> None:
        """Returns when the old data of the range is in the newest snapshot's scratch: for a backup that copies it all.

        Raises what made a copy fail, under either policy; the snapshot may have broken then.
        """
        first, end = self.clusters(offset, length)
        mine: list[_Copy] = []
        while self._newest is not None:
            self._start_copies(first, end, mine)
            await self.copies_ended(first, end)
            for copy in mine:
                if copy.error is not None:
                    raise copy.error
            if self._settled.all(first, end):
                return
            await asyncio.sleep(0)

    def settle_zeroes(self, offset: int, length: int) -> None:
        """The disk reads as zeroes there, as its block status just said, and a fresh scratch does too: no copy needed.

        Only whole clusters inside the range are settled, or such as the disk's end cuts short.
        """
        cluster = self.cluster_size_bytes
        end = (offset + length) // cluster if offset + length < self.source.size else -(-self.source.size // cluster)
        for start, stop, settled in self._settled.runs(-(-offset // cluster), end):
            if not settled and self._newest is not None and self._newest.fresh:
                # Not settled: no change has passed since, so the answer still holds.
                self._newest.done.set(start, stop)
                self._settled.set(start, stop)

    def _start_copies(self, first: int, end: int, mine: list[_Copy]) -> None:
        """Starts copying what is not settled of the range, as far as there is room; one copy whatever room there is.

        A copy that need not wait has ended on return. `mine` keeps those that have failed or are under way; the one is
        for a change that has none.
        """
        mine[:] = [copy for copy in mine if copy.error is not None or copy in self._copies]
        room = COPIES_MAX_BYTES // self.cluster_size_bytes - sum(copy.end - copy.start for copy in self._copies)
        while first < end and self._newest is not None:
            settled, stop = self._settled.run(first, end)
            if not settled:
                if room <= 0 and mine:
                    return
                stop = min(stop, first + max(1, COPY_MAX_BYTES // self.cluster_size_bytes))
                copy = _Copy(first, stop, self._newest)
                self._settled.set(first, stop)
                self._copies.append(copy)
                mine.append(copy)
                room -= stop - first
                eager.start(self._perform(copy))
                if copy.error is not None:
                    return
            first = stop

    async def _perform(self, copy: _Copy) -> None:
        start = copy.start * self.cluster_size_bytes
        length = min(copy.end * self.cluster_size_bytes, self.source.size) - start
        scratch = copy.snapshot.scratch
        try:
            data = await self.source.pread(start, length)
            if copy.given_up:
                return  # and the scratch may be gone
            if copy.snapshot.broken is not None:
                self._give_up(copy)  # its scratch may be what broke it
                return
            copy.is_read = True
            blank = is_zero(data)
            if not blank:
                await scratch.pwrite(start, data, serialising=copy.snapshot.serialising)
                spares.give(data)
            elif not copy.snapshot.fresh:
                await scratch.zero(start, length, serialising=copy.snapshot.serialising)
        except FleecerError as error:
            self._copy_failed(copy, error, [copy.snapshot] if copy.is_read else self._needing(copy.start, copy.end))
        except BaseException:
            bug = IoError(errno.EIO, scratch.node.name, "copy", start, length, "internal error")
            self._copy_failed(copy, bug, self._needing(copy.start, copy.end))
            raise
        else:
            if not copy.given_up:
                copy.over_at_s = asyncio.get_running_loop().time()
                copy.snapshot.hold(copy.start, copy.end, blank=blank)
                self._copies.remove(copy)
                copy.wake()

    def _copy_failed(self, copy: _Copy, error: FleecerError, concerned: list[Snapshot]) -> None:
        """Ends a copy that failed for `concerned`: all that need it, or only the one whose scratch would not take it.

        Those break, or have the change fail. For any other that needs it, whoever waits tries the next older scratch.
        """
        copy.error = error
        if copy.given_up:
            return
        self._copies.remove(copy)
        self._look_again()
        concerned = [snapshot for snapshot in concerned if snapshot.readable]
        copy.fails_change = any(snapshot.on_error == "break-guest-write" for snapshot in concerned)
        for snapshot in () if copy.fails_change else concerned:
            advice = "; free space there, or keep it elsewhere (scratch-dir)" if error.errno in _NO_SPACE else ""
            self.break_snapshot(snapshot, f"copying its old data failed: {told(error)}{advice}")
        copy.wake()

    def _next_deadline(self, since_s: float, now_s: float) -> float | None:
        """When after `now_s` a snapshot will have waited long enough, in the loop's time; None where none ever will."""
        deadlines = [since_s + snapshot.timeout_s for snapshot in self._readable() if snapshot.timeout_s]
        return min((deadline for deadline in deadlines if deadline > now_s), default=None)

    def _look_for_late(self, copies: list[_Copy], since_s: float, now_s: float, offset: int, length: int) -> None:
        """Ends the wait for copies, for those snapshots that need one and have waited long enough since `since_s`.

        A copy that only the scratch of one of those still holds up is given up with that one alone. Raises IoError
        (ETIMEDOUT), with nothing broken, where one of them has the guest's change fail.
        """
        late = [s for s in self._readable() if s.timeout_s and since_s + s.timeout_s <= now_s]
        for snapshot in sorted(late, key=_gives_way):
            late_for = next((copy for copy in copies if self._gives_way_to(snapshot, copy, late)), None)
            if late_for is not None:
                what = f"copying its old data to {late_for.snapshot.scratch.node.name} took longer than"
                self._change_timed_out(snapshot, what, offset, length)
        for copy in copies if late else ():
            if copy not in self._copies:
                continue
            if copy.is_read and not copy.snapshot.readable:
                copy.over_at_s = now_s
                self._give_up(copy)
            elif not self._needing(copy.start, copy.end):
                self._give_up(copy)

    def _gives_way_to(self, snapshot: Snapshot, copy: _Copy, late: list[Snapshot]) -> bool:
        """Whether a late snapshot has to give way because of this copy: unless it is only for another one's scratch."""
        if not self._reads_disk(snapshot, copy.start, copy.end):
            return False
        slow = copy.snapshot
        if slow is snapshot or not copy.is_read:
            return True
        return slow.readable and not (slow in late and self._reads_disk(slow, copy.start, copy.end))

    def _reader_timed_out(self, snapshot: Snapshot, offset: int, length: int) -> None:
        if snapshot.readable:
            self._change_timed_out(snapshot, "a read of the disk for it took longer than", offset, length)

    def _change_timed_out(self, snapshot: Snapshot, what: str, offset: int, length: int) -> None:
        cause = f"{what} {snapshot.timeout_s:g} s"
        if snapshot.on_error == "break-guest-write":
            raise IoError(errno.ETIMEDOUT, self.source.node.name, "write", offset, length, cause)
        self.break_snapshot(snapshot, cause)

    def _give_up(self, copy: _Copy) -> None:
        """Nobody waits for, or gains from, this copy any more. It ends by itself, unseen."""
        copy.given_up = True
        self._copies.remove(copy)
        self._look_again()
        copy.wake()

    def _give_up_useless(self, dropped: list[Snapshot]) -> None:
        for copy in list(self._copies):
            if self._newest is None or copy.snapshot in dropped:
                self._give_up(copy)

    def _needing(self, first: int, end: int) -> list[Snapshot]:
        """Every snapshot that would read any of these clusters from the disk."""
        return [snapshot for snapshot in self._readable() if self._reads_disk(snapshot, first, end)]

    # The snapshot's side.

    def locate(self, snapshot: Snapshot, first: int, end: int) -> tuple[Snapshot | None, int]:
        """Whose scratch holds cluster `first` for `snapshot` (None: the disk), and up to where at most `end`.

        Clusters a reader gave back raise IoError (EACCES); a broken snapshot raises SnapshotBroken.
        """
        snapshot.check()
        if snapshot.revoked is not None:
            revoked, end = snapshot.revoked.run(first, end)
            if revoked:
                at, length = first * self.cluster_size_bytes, (end - first) * self.cluster_size_bytes
                raise IoError(errno.EACCES, snapshot.name, "read", at, length, "the range was discarded by a reader")
        for holder in self._snapshots[self._snapshots.index(snapshot) :]:
            held, end = holder.done.run(first, end)
            if held:
                return holder, end
        return None, end

    def freeze(self, snapshot: Snapshot, offset: int, length: int) -> Claim:
        """Holds off changes of the range on the disk until `thaw`. In one step with the `locate` that chose it."""
        return snapshot.frozen.enter(offset, length)

    def thaw(self, snapshot: Snapshot, claim: Claim) -> None:
        """Ends a `freeze`."""
        snapshot.frozen.leave(claim)

    def revoke(self, snapshot: Snapshot, first: int, end: int) -> list[tuple[Snapshot, int, int]]:
        """The reader is through with these clusters: they read as an error from now on, and need no copy for it.

        Returns the runs of scratch (holder, first cluster, end) that nobody reads any more and that may be discarded.
        """
        snapshot.check()
        if snapshot.revoked is None:
            snapshot.revoked = Bitmap()
        free: list[tuple[Snapshot, int, int]] = []
        at = self._snapshots.index(snapshot)
        while first < end:
            holder, stop = None, end
            for candidate in self._snapshots[at:]:
                held, stop = candidate.done.run(first, stop)
                if held:
                    holder = candidate
                    break
            snapshot.revoked.set(first, stop)
            if holder is None and not self._needing(first, stop):
                self._settled.set(first, stop)
            if holder is not None and not any(self._reads_from(s, holder, first, stop) for s in self._readable()):
                free.append((holder, first, stop))
            first = stop
        return free

    async def copies_ended(self, first: int, end: int) -> None:
        """Returns when no copy of these clusters is under way."""
        while under_way := self._under_way(first, end):
            await under_way[0].ended()

    def _readable(self) -> list[Snapshot]:
        return [s for s in self._snapshots if s.readable]

    def _runs(self, snapshot: Snapshot, first: int, end: int) -> list[tuple[Snapshot | None, int, int]]:
        """The range, less what was revoked, as runs of (holder or None for the disk, first, end)."""
        runs: list[tuple[Snapshot | None, int, int]] = []
        while first < end:
            stop = end
            revoked = 0
            if snapshot.revoked is not None:
                revoked, stop = snapshot.revoked.run(first, end)
            if not revoked:
                holder, stop = self.locate(snapshot, first, stop)
                runs.append((holder, first, stop))
            first = stop
        return runs

    def _reads_disk(self, snapshot: Snapshot, first: int, end: int) -> bool:
        return any(holder is None for holder, _, _ in self._runs(snapshot, first, end))

    def _reads_from(self, snapshot: Snapshot, scratch_of: Snapshot, first: int, end: int) -> bool:
        return any(holder is scratch_of for holder, _, _ in self._runs(snapshot, first, end))


def _gives_way(snapshot: Snapshot) -> bool:
    """Sorts those first that make the change fail, so that no other breaks for a change that does not happen."""
    return snapshot.on_error == "break-snapshot"
