"""Options that do not fit their schema, told in words: which option, what it is, what it may be.

msgspec names the place and the rule; the value and the limits are looked up from what was given and in the type.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import inspect

from fleecer.errors import quoted

_PLACE = re.compile(r"^(?P<rule>.*?)(?: - at `\$\.?(?P<place>.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_ABSENT: Any = object()


def explain(error: msgspec.ValidationError, kind: Any, value: object) -> str:
    """One line on why `value`, decoded JSON, is not a `kind`, which is what `error` says."""
    match = _PLACE.match(str(error))
    assert match is not None, "the pattern fits any text"
    place = match["place"] or ""
    expected, parent = _look_up(inspect.type_info(kind), place, value)
    below = f" in {place}" if place else ""
    if found := _UNKNOWN.fullmatch(match["rule"]):
        known = ", ".join(sorted(_field_names(expected)))
        return f"option {quoted(found[1])}{below} is not known; known are {known or 'none'}"
    if found := _MISSING.fullmatch(match["rule"]):
        return f"option {found[1]}{below} is missing"
    given = _value_at(value, place)
    if expected is None or given is _ABSENT:
        return str(error)
    if parent is not None and isinstance(given, str):
        return f"{place} {quoted(given)} is not known; known are {', '.join(parent)}"
    return f"{place or 'what is given'} is {_shown(given)}; it must be {_words(expected)}"


def _steps(place: str) -> list[str | int]:
    return [int(number) if number else name for number, name in _STEP.findall(place)]


def _value_at(value: Any, place: str) -> Any:
    for step in _steps(place):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return _ABSENT
    return value


def _look_up(kind: inspect.Type, place: str, value: Any) -> tuple[inspect.Type | None, list[str] | None]:
    """The type at `place`, and, where that is what tells structures apart, the names it may have."""
    kind = _chosen(kind, value)
    tags: list[str] | None = None
    for step in _steps(place):
        tags = _tags(kind, step)
        if tags:
            return inspect.StrType(), tags
        below = _below(kind, step)
        if below is None:
            return None, None
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
        kind = _chosen(below, value)
    return kind, None


def _below(kind: inspect.Type, step: str | int) -> inspect.Type | None:
    if isinstance(kind, inspect.StructType):
        return next((field.type for field in kind.fields if field.encode_name == step), None)
    if isinstance(kind, inspect.ListType):
        return kind.item_type
    return None


def _structures(kind: inspect.Type) -> list[inspect.StructType]:
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return [one for one in members if isinstance(one, inspect.StructType)]


def _chosen(kind: inspect.Type, value: Any) -> inspect.Type:
    """What a value of a union is meant to be: the structure its tag names, or the list; else the union itself."""
    kind = _bare(kind)
    if isinstance(kind, inspect.UnionType):
        for one in kind.types:
            bare = _bare(one)
            if isinstance(value, dict) and isinstance(bare, inspect.StructType) and bare.tag_field is not None:
                if value.get(bare.tag_field) == bare.tag:
                    return bare
            elif isinstance(value, list) and isinstance(bare, inspect.ListType):
                return bare
    return kind


def _bare(kind: inspect.Type) -> inspect.Type:
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def _tags(kind: inspect.Type, step: str | int) -> list[str]:
    return sorted(str(one.tag) for one in _structures(kind) if one.tag_field == step)


def _field_names(kind: inspect.Type | None) -> set[str]:
    return set() if kind is None else {field.encode_name for one in _structures(kind) for field in one.fields}


def _shown(value: object) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)


def _words(kind: inspect.Type) -> str:
    match _bare(kind):
        case inspect.UnionType(types=types):
            words = [_words(one) for one in types if not isinstance(_bare(one), inspect.NoneType)]
            return " or ".join(dict.fromkeys(words))
        case inspect.IntType(ge=low, le=high):
            return f"a whole number{_range(low, high)}"
        case inspect.FloatType(ge=low, le=high):
            return f"a number{_range(low, high)}"
        case inspect.LiteralType(values=values) if len(values) > 1:
            return f"one of {', '.join(json.dumps(one).strip(chr(34)) for one in values)}"
        case inspect.LiteralType(values=values):
            return json.dumps(values[0]).strip('"')
        case inspect.StrType():
            return "text"
        case inspect.BoolType():
            return "true or false"
        case inspect.ListType():
            return "a list"
    return "an object"


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" of at least {low:g}"
    return f" from {low or 0:g} to {int(high)}"
