"""Parts of tables kept in memory, and work that several requests want done once.

Invariants: a slice that is dirty, or on its way to the file, or held by a writer, is never dropped, so what the cache
holds is what the image means; concurrent readers of one slice share one read. The cache is bounded but for such slices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from fleecer import eager
from fleecer.waiters import Waiters

T = TypeVar("T")


class SingleFlight:
    """Lets one of several callers have a piece of work done; the others wait for its end, whatever that is.

    The work goes on to its end also when whoever wanted it is cancelled: it must not stop half-way.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    async def run(self, key: Hashable, work: Callable[[], Awaitable[None]]) -> None:
        """Has `work` done, or waits until what is done for `key` has ended or failed. Callers check again afterwards.

        Raises what the work raised, to whoever had it done.
        """
        flight = self._flights.get(key)
        if flight is not None:
            await flight.over.wait()
            return
        flight = self._flights[key] = _Flight()
        eager.start(self._perform(key, flight, work))
        if not flight.is_over:
            await flight.over.wait()
        if flight.error is not None:
            raise flight.error

    async def _perform(self, key: Hashable, flight: _Flight, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - raised where it was asked for
            flight.error = error
        finally:
            del self._flights[key]
            flight.is_over = True
            flight.over.wake()


class _Flight:
    """One piece of work under way."""

    __slots__ = ("error", "is_over", "over")

    def __init__(self) -> None:
        self.over = Waiters()
        self.is_over = False
        self.error: Exception | None = None


class Slice(Generic[T]):
    """A part of a table. Who changes `data` marks it dirty in the same step; `pins` keep it in the cache."""

    __slots__ = ("data", "offset", "pins", "used")

    def __init__(self, offset: int, data: T) -> None:
        self.offset = offset
        self.data = data
        self.pins = 0
        self.used = False


class SliceCache(Generic[T]):
    """Slices of one kind of table, by their host offset.

    `slices` may be looked into directly: set `used` on what is found, it decides what is dropped first.
    """

    def __init__(self, slice_bytes: int, bytes_max: int, read: Callable[[int], Awaitable[T]]) -> None:
        self.slice_bytes = slice_bytes
        self.slices: OrderedDict[int, Slice[T]] = OrderedDict()
        self.dirty: dict[int, Slice[T]] = {}
        self._slices_max = max(bytes_max // slice_bytes, 1)
        self._read = read
        self._loading: dict[int, Waiters] = {}

    async def fetch(self, offset: int) -> Slice[T]:
        """The slice at `offset`, read if need be. Without a wait after it, it is in the cache."""
        while True:
            slice_ = self.slices.get(offset)
            if slice_ is not None:
                slice_.used = True
                return slice_
            loading = self._loading.get(offset)
            if loading is not None:
                await loading.wait()
                continue
            slice_ = await self._load(offset)
            if slice_ is not None:
                return slice_

    async def _load(self, offset: int) -> Slice[T] | None:
        """Reads a slice into the cache; None if its place got another use meanwhile."""
        done = self._loading[offset] = Waiters()
        try:
            data = await self._read(offset)
            if self._loading.get(offset) is not done:
                return None
            self._make_room()
            slice_ = self.slices[offset] = Slice(offset, data)
            return slice_
        finally:
            if self._loading.get(offset) is done:
                del self._loading[offset]
            done.wake()

    def _make_room(self) -> None:
        slices = self.slices
        tries = 2 * len(slices)
        while len(slices) >= self._slices_max and tries:
            tries -= 1
            offset, slice_ = next(iter(slices.items()))
            if slice_.used or slice_.pins or offset in self.dirty:
                slice_.used = False
                slices.move_to_end(offset)
            else:
                del slices[offset]

    def mark_dirty(self, slice_: Slice[T]) -> None:
        """Notes that `slice_`, which is in the cache, has changed."""
        self.dirty[slice_.offset] = slice_

    def take_dirty(self) -> list[Slice[T]]:
        """All dirty slices, from now on clean but pinned: the caller copies them at once and unpins them later."""
        taken = list(self.dirty.values())
        for slice_ in taken:
            slice_.pins += 1
        self.dirty.clear()
        return taken

    def forget(self, offset: int, length: int) -> None:
        """Drops what is known of a host range that from now on holds another table."""
        for at in range(offset, offset + length, self.slice_bytes):
            slice_ = self.slices.pop(at, None)
            assert slice_ is None or not (slice_.pins or at in self.dirty), f"slice at {at} of a freed table is in use"
            self._loading.pop(at, None)
