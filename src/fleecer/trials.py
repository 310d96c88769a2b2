"""Trials: what often pays, and often is in vain, is tried now and then.

Invariant: after each trial in vain in a row twice as many chances pass before the next one, up to a limit; after one
that paid, none do.
"""

from __future__ import annotations


class Trials:
    """Says when to try. `passes_max` is how many chances pass at most between two trials."""

    __slots__ = ("_passes", "_passes_max", "_passes_next")

    def __init__(self, passes_max: int) -> None:
        self._passes_max = passes_max
        self._passes = 0  # chances to let pass
        self._passes_next = 1

    def is_due(self) -> bool:
        """To be asked at each chance: whether to try now."""
        if self._passes:
            self._passes -= 1
            return False
        return True

    def paid(self) -> None:
        """It paid to try: try again at the next chance."""
        self._passes, self._passes_next = 0, 1

    def in_vain(self) -> None:
        """It was in vain to try."""
        self._passes = self._passes_next
        self._passes_next = min(2 * self._passes_next, self._passes_max)
