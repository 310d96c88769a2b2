"""Commands: functions whose signatures are their schema.

A command is an async function that takes a `Context` first; its other parameters are the command's arguments, decoded
and checked against their annotations before it runs. Underscores in names stand for dashes. A function with one
positional-only parameter takes the whole `arguments` object as that type (blockdev-add's options, told apart by
`driver`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from fleecer.block.schema import explain
from fleecer.daemon import Daemon
from fleecer.errors import FleecerError
from fleecer.wire.qmp import QmpError


@dataclasses.dataclass(slots=True)
class Context:
    """What a command works on. `quit` asks the daemon to end.

    `at_end` is what runs when the client that asked has gone: what ends its temporary snapshots, by their names.
    """

    daemon: Daemon
    quit: Callable[[], None]
    at_end: dict[str, Callable[[], Awaitable[None]]]


CommandFunction = Callable[..., Awaitable[Any]]


@dataclasses.dataclass(slots=True)
class Spec:
    """One command: its name, what it does, its arguments as a type, and its function."""

    name: str
    summary: str
    arguments: Any
    whole: bool
    function: CommandFunction


COMMANDS: dict[str, Spec] = {}


def command(function: CommandFunction) -> CommandFunction:
    """Enters `function` as the command of its name."""
    name = function.__name__.rstrip("_").replace("_", "-")
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    whole = len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY
    arguments: Any
    if whole:
        arguments = hints[parameters[0].name]
    else:
        fields: list[Any] = [
            (p.name, hints[p.name]) if p.default is p.empty else (p.name, hints[p.name], p.default) for p in parameters
        ]
        arguments = msgspec.defstruct(name, fields, rename="kebab", forbid_unknown_fields=True, kw_only=True)
    summary = (inspect.getdoc(function) or "").split("\n", 1)[0]
    COMMANDS[name] = Spec(name, summary, arguments, whole, function)
    return function


async def execute(context: Context, name: str, arguments: msgspec.Raw) -> Any:
    """Runs a command. Raises QmpError for a command or arguments that are wrong, FleecerError for what failed."""
    spec = COMMANDS.get(name)
    if spec is None:
        raise QmpError("CommandNotFound", f"The command {name} has not been found")
    try:
        decoded = msgspec.json.decode(arguments, type=spec.arguments)
    except msgspec.ValidationError as error:
        problem = explain(error, spec.arguments, json.loads(bytes(arguments)))
        raise QmpError("GenericError", f"{name}: {problem}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise QmpError("GenericError", f"{name}: {error}") from None
    try:
        if spec.whole:
            return await spec.function(context, decoded)
        given = {field: getattr(decoded, field) for field in decoded.__struct_fields__}
        return await spec.function(context, **given)
    except FleecerError:
        raise
    except OSError as error:
        raise QmpError("GenericError", f"{name}: {error.strerror or error}") from error
