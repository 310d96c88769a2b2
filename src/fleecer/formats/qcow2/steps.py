"""What the pure walks over an image ask of whoever drives them: bytes to be read, bytes to be written."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")


class Read(NamedTuple):
    """Asks for `length` bytes at `offset` of the file; what lies past its end is to be given as zeroes."""

    offset: int
    length: int


class Write(NamedTuple):
    """Asks for `data` to be written at `offset` of the file; nothing is sent back."""

    offset: int
    data: bytes


Steps: TypeAlias = Generator[Read | Write, bytes, T]
"""A walk: its steps are carried out in order, and the bytes read (nothing, for a write) are sent back in."""
