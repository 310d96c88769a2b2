"""Fleecer: a storage daemon for live disks.

It serves disk images over NBD and hands out exact point-in-time copies of them while they are written. `Daemon` is the
whole of it in a program; see docs/howto/embed.md.
"""

from __future__ import annotations

__version__ = "0.1.0"
