"""The storage daemon: a service put together by qemu-storage-daemon's options, in the order in which they are given.

Each option does what the QMP command of the same purpose does; the arguments are checked by that command's schema.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import msgspec

from fleecer.app import keyval
from fleecer.app.serving import Service, service, settle
from fleecer.block.schema import explain
from fleecer.daemon import Daemon
from fleecer.errors import IoError, NotFound, UsageError, quoted
from fleecer.monitor.registry import COMMANDS, Context, execute
from fleecer.net.stream import connect_unix

OPTIONS = ("--blockdev", "--nbd-server", "--export", "--chardev", "--monitor", "--object", "--pidfile")

T = TypeVar("T")

Given = Sequence[tuple[str, str]]
"""Options and their values, in order."""


class _Socket(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """--chardev socket: a unix socket, ours (server) or another's. `wait` for a client before going on is not done."""

    id: str
    path: str
    server: bool = False
    wait: bool = False


class _Monitor(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, kw_only=True):
    """--monitor: QMP at a chardev."""

    chardev: str
    mode: Literal["control"] = "control"
    pretty: bool = False


def split(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The command line as options and values. Raises UsageError for what is no option, or lacks its value."""
    given: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") and name.startswith("-") and len(name) > 2:
            name = f"-{name}"  # QEMU takes one dash for two
        if name not in OPTIONS:
            raise UsageError(f"option {quoted(argument)} is not known; known are {', '.join(OPTIONS)}")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise UsageError(f"option {name} needs a value")
            value = following
        if name != "--pidfile" and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UsageError(f"option {name} {quoted(value)} is not UTF-8, as QMP wants; rename it")
        given.append((name, value))
    return given


async def run(given: Given) -> None:
    """Carries the options out, then serves until told to stop. On return all that was written is durable.

    Raises FleecerError, for an option (what came before it is undone), or for what the end failed to do.
    """
    with contextlib.ExitStack() as at_end:
        async with service(Daemon()) as running:
            setup = _Setup(running)
            for name, value in given:
                if name == "--pidfile":
                    at_end.enter_context(_pidfile(value))
                else:
                    await setup.apply(name, value)
            settle()
            await running.stopped()


class _Setup:
    """Carries options out, one after the other."""

    def __init__(self, running: Service) -> None:
        self._service = running
        self._context = Context(running.daemon, running.stop, {})
        self._chardevs: dict[str, _Socket] = {}

    async def apply(self, name: str, value: str) -> None:
        """Does what one option asks. Raises FleecerError that begins with its name."""
        try:
            match name:
                case "--blockdev":
                    await self._execute("blockdev-add", keyval.parse(value, implied_key="driver"))
                case "--nbd-server":
                    await self._execute("nbd-server-start", _nested_address(keyval.parse(value)))
                case "--export":
                    await self._execute("block-export-add", keyval.parse(value, implied_key="type"))
                case "--chardev":
                    self._chardev(keyval.parse(value, implied_key="backend"))
                case "--monitor":
                    await self._monitor(_converted(keyval.parse(value, implied_key="chardev"), _Monitor))
                case "--object":
                    kind = keyval.parse(value, implied_key="qom-type").get("qom-type", "")
                    raise UsageError(f"object type {quoted(str(kind))} is not supported, nor is any other yet")
        except _UnfitError as error:
            raise UsageError(f"{name} {value}: {error}") from None

    async def _execute(self, command: str, tree: keyval.Tree) -> None:
        kind = COMMANDS[command].arguments
        await execute(self._context, command, msgspec.Raw(msgspec.json.encode(_converted(tree, kind))))

    def _chardev(self, tree: keyval.Tree) -> None:
        backend = tree.pop("backend", "")
        if backend != "socket":
            raise UsageError(f"chardev backend {quoted(str(backend))} is not supported; socket is, with path=PATH")
        chardev = _converted(tree, _Socket)
        if chardev.wait:
            raise UsageError(f"chardev {quoted(chardev.id)}: wait=on is not supported; use wait=off")
        if chardev.id in self._chardevs:
            raise UsageError(f"chardev id {quoted(chardev.id)} is taken; choose another")
        self._chardevs[chardev.id] = chardev

    async def _monitor(self, options: _Monitor) -> None:
        if options.pretty:
            raise UsageError("monitor: pretty=on is not supported")
        chardev = self._chardevs.get(options.chardev)
        if chardev is None:
            raise NotFound("chardev", options.chardev)
        if chardev.server:
            self._service.monitor.listen_unix(chardev.path)
        else:
            self._service.monitor.serve(await connect_unix(chardev.path))


class _UnfitError(UsageError):
    """Options that do not fit their schema."""


def _converted(tree: keyval.Tree, kind: type[T]) -> T:
    given = keyval.typed(tree, kind)
    try:
        return msgspec.convert(given, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise _UnfitError(explain(error, kind, given)) from None


def _nested_address(tree: keyval.Tree) -> keyval.Tree:
    """nbd-server-start takes its address in QEMU's older form, the option in the newer, flat one."""
    address = tree.get("addr")
    if isinstance(address, dict) and "data" not in address:
        data = dict(address)
        kind = data.pop("type", None)
        return tree | {"addr": {"type": kind, "data": data}}
    return tree


@contextlib.contextmanager
def _pidfile(path: str) -> Iterator[None]:
    """Holds this process's number in a file, which goes at the end. Raises IoError; an existing file is replaced.

    It appears whole: whoever waits for it may read it at once.
    """
    hidden = f"{path}.{os.getpid()}"
    try:
        with open(hidden, "x", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        os.rename(hidden, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        raise IoError(error.errno or errno.EIO, path, "write the pidfile") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
