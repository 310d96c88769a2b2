"""QEMU's option syntax: `key=value,key.sub=value`, with ",," for a comma in a value; or a JSON object.

Everything in the first form is text; `typed` turns what a structure declares as boolean from on and off, and leaves
numbers to msgspec's lax conversion.
"""

from __future__ import annotations

import re
import types
import typing
from typing import Any

import msgspec

from fleecer.errors import UsageError, quoted

Tree = dict[str, Any]

_BOOLEANS = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}
_KEY_PART = re.compile(r"[A-Za-z0-9_-]+")


def parse(text: str, *, implied_key: str | None = None) -> Tree:
    """The options in `text`, as a tree. The first may lack its key where `implied_key` stands for it.

    Raises UsageError that names the piece at fault.
    """
    if text.lstrip().startswith("{"):
        try:
            decoded = msgspec.json.decode(text)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise UsageError(f"options {quoted(text)} are no JSON: {error}") from None
        if not isinstance(decoded, dict):
            raise UsageError(f"options {quoted(text)} are no JSON object")
        return decoded
    tree: Tree = {}
    for position, piece in enumerate(_pieces(text)):
        key, equals, value = piece.partition("=")
        if not equals:
            if position or implied_key is None:
                raise UsageError(f"option {quoted(piece)} in {quoted(text)} is not of the form key=value")
            key, value = implied_key, piece
        _put(tree, key, value, text)
    return tree


def typed(tree: Tree, kind: Any) -> Tree:
    """The same with on, off, yes, no, true and false as booleans, under names that `kind` declares as such.

    `kind` is a msgspec structure or a union of them. Raises UsageError for any other text under such a name.
    """
    return _with_booleans(tree, _boolean_names(kind, set()))


def _pieces(text: str) -> list[str]:
    """The text cut at single commas; doubled ones become one."""
    pieces = [""]
    for index, part in enumerate(re.split(r"(,,?)", text)):
        if part == ",":
            pieces.append("")
        else:
            pieces[-1] += "," if index % 2 else part
    if len(pieces) > 1 and not pieces[-1]:
        pieces.pop()  # a comma at the end, which QEMU allows
    return pieces


def _put(tree: Tree, key: str, value: str, text: str) -> None:
    *parents, last = key.split(".")
    for part in (*parents, last):
        if not _KEY_PART.fullmatch(part):
            raise UsageError(f"key {quoted(key)} in {quoted(text)} is not made of names joined by dots")
    at = tree
    for part in parents:
        below = at.setdefault(part, {})
        if not isinstance(below, dict):
            raise UsageError(f"key {quoted(part)} in {quoted(text)} has a value, and so can have nothing below it")
        at = below
    if isinstance(at.get(last), dict):
        raise UsageError(f"key {quoted(last)} in {quoted(text)} has keys below it, and so can have no value")
    at[last] = value


def _boolean_names(kind: Any, seen: set[Any]) -> set[str]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return set().union(*(_boolean_names(one, seen) for one in typing.get_args(kind)))
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)) or kind in seen:
        return set()
    seen.add(kind)
    names: set[str] = set()
    for field in msgspec.structs.fields(kind):
        if field.type is bool:
            names.add(field.encode_name)
        names |= _boolean_names(field.type, seen)
    return names


def _with_booleans(tree: Tree, names: set[str]) -> Tree:
    result: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            result[key] = _with_booleans(value, names)
        elif key in names and isinstance(value, str):
            if value not in _BOOLEANS:
                raise UsageError(f"option {key} is {quoted(value)}; it must be on or off")
            result[key] = _BOOLEANS[value]
        else:
            result[key] = value
    return result
