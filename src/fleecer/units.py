"""Sizes in bytes: their units, how people write them, and how they are shown."""

from __future__ import annotations

import re

from fleecer.errors import UsageError, quoted

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SUFFIXES = {"": 1, "B": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}
_SIZE = re.compile(r"(\d+)(?:\.(\d{1,9}))?\s*([BKMGT]?)(?:I?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes meant by `text`: a number with an optional suffix K, M, G or T (powers of 1024), as in "1.5G" or "64KiB".

    Raises UsageError when the text is not a size or the result is not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"size {quoted(text)} is not a number with an optional suffix K, M, G or T")
    whole, fraction, suffix = match.groups()
    unit = _SUFFIXES[suffix.upper()]
    size = int(whole) * unit
    if fraction:
        part, rest = divmod(int(fraction) * unit, 10 ** len(fraction))
        if rest and unit == 1:
            raise UsageError(f"size {quoted(text)} is not a whole number of bytes")
        size += part
    return size


def format_size(size_bytes: float) -> str:
    """A size for people: at most four digits and a binary unit, as in "1.5 GiB"."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
