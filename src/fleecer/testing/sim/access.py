"""What each step of a run touched: found by watching the real objects, not by declaring it.

Two steps that touch nothing in common, or touch it in ways that commute, may change places without anybody noticing:
that is what lets explore.py leave most interleavings out. So a touch that is missed here hides bugs there.

    attributes   of every object of the block layer, the jobs and what stands above, by name: read or written. What an
                 attribute holds (list, dict, set, bytes) counts as read, and as written if it is another after the step
    claims       (InFlight) per page: sharing claims commute with each other; serialising ones and who waits do not
    bitmaps      per bit: settings commute
    disks        per page: what took effect, not what was submitted
    order        of the oracle: which change returned before what was called

Objects are named after the step that made them, so the same object has the same name in every run that shares its past.
"""

from __future__ import annotations

import asyncio.locks
import functools
import importlib
import inspect
import pkgutil
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

from bitarray import bitarray

from fleecer.block.bitmap import Bitmap
from fleecer.block.inflight import Claim, InFlight
from fleecer.testing.sim.disk import SimDisk
from fleecer.testing.sim.loop import NamedLoop
from fleecer.testing.sim.oracle import SECTOR_BYTES, Change, History

READ, COMMUTE, WRITE = 1, 2, 4
Touched = dict[Any, int]
"""By resource: the ways in which it was touched, or-ed."""

_WATCHED = ("fleecer.block", "fleecer.jobs", "fleecer.export", "fleecer.testing.sim.world")
_MODELLED = (Bitmap, InFlight, Claim)
_COMMUTING = {"busy", "readers", "_claims_ended"}  # counters: ups and downs change places freely, not so who looks
_CONTAINERS = (list, dict, set, deque, bytearray, array, bitarray, OrderedDict)
_PAGE_BYTES = 4096
_BITS_MAX = 256


def conflict(one: Touched, other: Touched) -> bool:
    """Whether two steps that touched these may not change places."""
    if len(other) < len(one):
        one, other = other, one
    for resource, how in one.items():
        their = other.get(resource)
        if their is not None and _CONFLICT[how][their]:
            return True
    return False


_CONFLICT = [
    [bool((a | b) & WRITE) or bool(a & READ and b & COMMUTE) or bool(a & COMMUTE and b & READ) for b in range(8)]
    for a in range(8)
]


class Recorder:
    """Notes what is touched in one run, while `active`."""

    def __init__(self, loop: NamedLoop) -> None:
        self.loop = loop
        self.active = False
        self._touched: Touched = {}
        self._held: dict[Any, tuple[Any, Any]] = {}  # containers looked at in this step, with what they held
        self._names: dict[int, tuple[Any, str]] = {}  # keeps the objects alive, so that ids stay theirs

    def begin(self) -> None:
        """Forgets what was touched."""
        self._touched, self._held = {}, {}

    def take(self) -> Touched:
        """What was touched since the last time."""
        touched = self._touched
        for resource, (container, before) in self._held.items():
            if not _same(before, _content(container)):
                touched[resource] = touched.get(resource, 0) | WRITE
        self._touched, self._held = {}, {}
        return touched

    def name(self, thing: object) -> str:
        """The object's name; given when it is first asked for, which is when it is made."""
        known = self._names.get(id(thing))
        if known is None:
            known = self._names[id(thing)] = thing, self.loop.fresh_name()
        return known[1]

    def touch(self, thing: object, part: object, how: int) -> None:
        """Notes that a part of a thing was touched."""
        resource = self.name(thing), part
        self._touched[resource] = self._touched.get(resource, 0) | how

    def touch_range(self, thing: object, units: Iterable[int], how: int) -> None:
        """Notes that these units of a thing were touched."""
        for unit in units:
            self.touch(thing, unit, how)

    def attribute_read(self, thing: object, attribute: str, value: object) -> None:
        """Notes an attribute that was looked at, and through it what it holds."""
        resource = self.name(thing), attribute
        if attribute not in _COMMUTING:
            self._touched[resource] = self._touched.get(resource, 0) | READ
        else:
            self._touched.setdefault(resource, READ)
        if isinstance(value, _CONTAINERS):
            inner = resource, "[]"
            if inner not in self._held:
                self._held[inner] = value, _content(value)
                self._touched[inner] = READ

    def attribute_written(self, thing: object, attribute: str) -> None:
        """Notes an attribute that was set."""
        self.touch_attribute(thing, attribute, COMMUTE if attribute in _COMMUTING else WRITE)

    def touch_attribute(self, thing: object, attribute: str, how: int) -> None:
        """As `touch`; a counter that is written was not looked at for its own sake."""
        resource = self.name(thing), attribute
        self._touched[resource] = how if how == COMMUTE else self._touched.get(resource, 0) | how


def _content(value: object, depth: int = 3) -> Any:
    """What a container holds, to be compared later: inner containers by content, all else by identity."""
    if isinstance(value, dict):
        return tuple((key, _content(inner, depth - 1)) for key, inner in value.items()) if depth else id(value)
    if isinstance(value, (list, tuple, deque)):
        return tuple(_content(inner, depth - 1) for inner in value) if depth else id(value)
    if isinstance(value, (bytearray, array, bitarray)):
        return value.tobytes() if not isinstance(value, bytearray) else bytes(value)
    if isinstance(value, set):
        return frozenset(id(inner) for inner in value), tuple(value)
    return value


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    if isinstance(before, tuple) and isinstance(after, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, (int, str, bytes, frozenset)):
        return bool(before == after)
    return False


_current: Recorder | None = None


class Watch:
    """Makes the classes watched report to `recorder`, from `install` to `remove`. `also`: more classes to watch."""

    def __init__(self, also: Iterable[type] = ()) -> None:
        self._watched = (*_classes(), *also)
        self._undo: list[Callable[[], None]] = []
        self._reading = False

    def install(self) -> None:
        """Begins: objects get their names as they are made."""
        for watched in self._watched:
            _replace(self._undo, watched, "__setattr__", _setattr)
        for model in (_model_claims, _model_bitmaps, _model_disks, _model_order):
            model(self._undo)

    def remove(self) -> None:
        """Leaves the classes as they were."""
        self.report_to(None)
        for restore in reversed(self._undo):
            restore()
        self._undo.clear()

    def report_to(self, recorder: Recorder | None) -> None:
        """Nothing is noted until `note` says so; the last recorder's notes end."""
        global _current
        if _current is not None:
            self.note(False)
        _current = recorder

    def note(self, on: bool) -> None:
        """Begins or ends noting. Hearing of every attribute that is read is slow, so it is on only meanwhile."""
        assert _current is not None, "nobody is there to take notes"
        if on and not _current.active:
            _current.begin()
        _current.active = on
        if on != self._reading:
            self._reading = on
            for watched in self._watched:
                if on:
                    type.__setattr__(watched, "__getattribute__", _getattribute)
                else:
                    type.__delattr__(watched, "__getattribute__")


@functools.cache
def _classes() -> tuple[type, ...]:
    """What is watched: classes with changing instances, each once (subclasses inherit the watching)."""
    found: list[type] = [asyncio.locks.Lock]
    for package in _WATCHED:
        root = importlib.import_module(package)
        names = [package]
        if hasattr(root, "__path__"):
            names += [module.name for module in pkgutil.walk_packages(root.__path__, package + ".")]
        for name in names:
            module = importlib.import_module(name)
            found += [candidate for candidate in vars(module).values() if _is_watchable(candidate, name)]
    found.sort(key=lambda cls: len(cls.__mro__))
    chosen: list[type] = []
    for candidate in found:
        if not any(issubclass(candidate, other) for other in chosen):
            chosen.append(candidate)
    return tuple(chosen)


def _is_watchable(candidate: object, module: str) -> bool:
    return (
        inspect.isclass(candidate)
        and candidate.__module__ == module
        and candidate not in _MODELLED
        and not issubclass(candidate, (BaseException, tuple))
        and not getattr(candidate, "_is_protocol", False)
        and not hasattr(candidate, "__struct_fields__")
    )


def _replace(undo: list[Callable[[], None]], owner: type, name: str, function: object) -> None:
    own = owner.__dict__.get(name)
    setattr(owner, name, function)
    if own is not None:
        undo.append(functools.partial(setattr, owner, name, own))
    else:
        undo.append(functools.partial(delattr, owner, name))


_data_names: dict[type, frozenset[str] | None] = {}


def _slots(cls: type) -> frozenset[str] | None:
    """The data attributes of a class made of slots; None for one whose instances have a dictionary."""
    if cls not in _data_names:
        slots: set[str] = set()
        for base in cls.__mro__:
            own = base.__dict__.get("__slots__", ())
            slots.update((own,) if isinstance(own, str) else own)
        _data_names[cls] = None if cls.__dictoffset__ else frozenset(slots)
    return _data_names[cls]


def _getattribute(self: Any, name: str) -> Any:
    value = object.__getattribute__(self, name)
    recorder = _current
    if recorder is not None and name[:2] != "__":
        slots = _slots(type(self))
        if name in (slots if slots is not None else object.__getattribute__(self, "__dict__")):
            recorder.attribute_read(self, name, value)
    return value


def _setattr(self: Any, name: str, value: Any) -> None:
    object.__setattr__(self, name, value)
    recorder = _current
    if recorder is not None:
        if recorder.active:
            recorder.attribute_written(self, name)
        else:
            recorder.name(self)


def _wrap(
    undo: list[Callable[[], None]], owner: type, name: str, note: Callable[..., None], *, after: bool = False
) -> None:
    """Makes the method tell `note`, with its arguments, before (or `after`) it does its work."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def noted(self: Any, *args: Any, **options: Any) -> Any:
        recorder = _current
        if recorder is not None and recorder.active and not after:
            note(recorder, self, *args, **options)
        result = original(self, *args, **options)
        if recorder is not None and recorder.active and after:
            note(recorder, self, *args, **options)
        return result

    _replace(undo, owner, name, noted)


def _name_at_birth(undo: list[Callable[[], None]], owner: type) -> None:
    original = owner.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def noted(self: Any, *args: Any, **options: Any) -> None:
        if _current is not None:
            _current.name(self)
        original(self, *args, **options)

    _replace(undo, owner, "__init__", noted)


def _pages(offset: int, length: int) -> range:
    return range(offset // _PAGE_BYTES, -(-(offset + length) // _PAGE_BYTES))


def _model_claims(undo: list[Callable[[], None]]) -> None:
    def how(serialising: bool) -> int:
        return WRITE if serialising else COMMUTE

    def entering(recorder: Recorder, claims: InFlight, offset: int, length: int, serialising: bool = False) -> None:
        recorder.touch_range(claims, _pages(offset, length), how(serialising))
        recorder.touch(claims, "any", COMMUTE)
        if serialising:
            recorder.touch(claims, "serialising", COMMUTE)

    def leaving(recorder: Recorder, claims: InFlight, claim: Claim) -> None:
        entering(recorder, claims, claim.start, claim.end - claim.start, claim.serialising)

    def looking(recorder: Recorder, claims: InFlight, offset: int, length: int) -> None:
        recorder.touch_range(claims, _pages(offset, length), READ)

    def beginning(recorder: Recorder, claims: InFlight, start: int, end: int, *_: object) -> None:
        looking(recorder, claims, start, end - start)
        entering(recorder, claims, start, end - start)

    def ending(recorder: Recorder, claims: InFlight, claim: Claim, *_: object) -> None:
        leaving(recorder, claims, claim)

    def counting(what: str) -> Callable[..., None]:
        return lambda recorder, claims: recorder.touch(claims, what, READ)

    _name_at_birth(undo, InFlight)
    _wrap(undo, InFlight, "enter", entering)
    _wrap(undo, InFlight, "leave", leaving)
    _wrap(undo, InFlight, "begin_read", beginning)
    _wrap(undo, InFlight, "_read_ended", ending)
    _wrap(undo, InFlight, "overlaps", looking)
    _wrap(undo, InFlight, "until_clear", looking)
    _wrap(undo, InFlight, "would_wait", looking)
    _wrap(undo, InFlight, "__len__", counting("any"))
    _wrap(undo, InFlight, "changing", counting("serialising"))


def _model_bitmaps(undo: list[Callable[[], None]]) -> None:
    def touching(how: int) -> Callable[..., None]:
        def note(recorder: Recorder, bitmap: Bitmap, start: int, end: int) -> None:
            recorder.touch_range(bitmap, range(start, min(end, start + _BITS_MAX)), how)

        return note

    def one(recorder: Recorder, bitmap: Bitmap, bit: int) -> None:
        recorder.touch(bitmap, bit, READ)

    def whole(recorder: Recorder, bitmap: Bitmap, *_: object) -> None:
        recorder.touch_range(bitmap, range(_BITS_MAX // 16), READ)

    def merging(recorder: Recorder, bitmap: Bitmap, other: Bitmap) -> None:
        recorder.touch_range(bitmap, range(_BITS_MAX // 16), WRITE)
        recorder.touch_range(other, range(_BITS_MAX // 16), READ)

    _name_at_birth(undo, Bitmap)
    _wrap(undo, Bitmap, "set", touching(COMMUTE))
    _wrap(undo, Bitmap, "clear", touching(WRITE))
    _wrap(undo, Bitmap, "run", touching(READ))
    _wrap(undo, Bitmap, "__getitem__", one)
    _wrap(undo, Bitmap, "any", whole)
    _wrap(undo, Bitmap, "count", whole)
    _wrap(undo, Bitmap, "update", merging)


def _model_disks(undo: list[Callable[[], None]]) -> None:
    def put(recorder: Recorder, disk: SimDisk, offset: int, data: bytes) -> None:
        recorder.touch_range(disk, _pages(offset, len(data)), WRITE)
        if offset + len(data) > len(disk.data):
            recorder.touch(disk, "size", WRITE)

    def copied(recorder: Recorder, disk: SimDisk, _data: bytearray, _base: int, start: int, end: int) -> None:
        recorder.touch_range(disk, _pages(start, end - start), READ)

    def looked(recorder: Recorder, disk: SimDisk, offset: int, length: int) -> None:
        recorder.touch_range(disk, _pages(offset, length), READ)

    def synced(recorder: Recorder, disk: SimDisk, _covered: object) -> None:
        recorder.touch(disk, "durable", WRITE)

    def sized(recorder: Recorder, disk: SimDisk, _size: int) -> None:
        recorder.touch(disk, "size", WRITE)

    _name_at_birth(undo, SimDisk)
    _wrap(undo, SimDisk, "_put", put)
    _wrap(undo, SimDisk, "_copy_out", copied)
    _wrap(undo, SimDisk, "_look", looked)
    _wrap(undo, SimDisk, "_synced", synced)
    _wrap(undo, SimDisk, "_resize", sized)


def _model_order(undo: list[Callable[[], None]]) -> None:
    def pages(first: int, end: int) -> range:
        return _pages(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES)

    def called(recorder: Recorder, history: History, first: int, end: int, **_: bool) -> None:
        for page in pages(first, end):
            recorder.touch(history, ("returned", page), READ)
            recorder.touch(history, ("called", page), COMMUTE)

    def returned(recorder: Recorder, history: History, change: Change, **_: bool) -> None:
        for page in pages(change.first, change.end):
            recorder.touch(history, ("returned", page), COMMUTE)

    def read(recorder: Recorder, history: History, offset: int, data: bytes, _began: int) -> None:
        for page in _pages(offset, len(data)):
            recorder.touch(history, ("called", page), READ)

    def all_of(part: str) -> Callable[..., None]:
        def note(recorder: Recorder, history: History, **_: bool) -> None:
            for page in pages(0, history.sectors):
                recorder.touch(history, (part, page), READ)

        return note

    _name_at_birth(undo, History)
    _wrap(undo, History, "begin", called)
    _wrap(undo, History, "finish", returned)
    _wrap(undo, History, "check_read", read)
    _wrap(undo, History, "begin_read", all_of("returned"))
    _wrap(undo, History, "image", all_of("returned"))
