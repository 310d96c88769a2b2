"""Events: what happened, told to everyone who asked, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]
"""Takes an event's name (as in QMP) and its data. Must not raise, wait, or call back."""


class Events:
    """The listeners of one daemon."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def follow(self, listener: Listener) -> Callable[[], None]:
        """Tells `listener` of every event from now on. Returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def announce(self, name: str, data: dict[str, Any]) -> None:
        """Tells everyone."""
        for listener in list(self._listeners):
            listener(name, data)
