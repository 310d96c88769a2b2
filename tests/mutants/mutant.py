"""What a mutant is: one small mistake, as a piece of text in place of another.

A mutant whose old text does not occur exactly once is an error: the code has changed, and the mutant must follow.
"""

from __future__ import annotations

import dataclasses
import pathlib

PACKAGE = pathlib.PurePath("src/fleecer")


class DoesNotApply(Exception):
    """The old text is not there, or there more than once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake: `old`, whole lines of the file `path` of the package, becomes `new`. `breaks` is the rule it breaks.

    Both texts may begin with a line break, which does not count. `tests` are tests, as pytest is told of them, that
    are to find it; where there are none, the gauntlet is.
    """

    name: str
    path: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...] = ()

    def apply(self, tree: pathlib.Path) -> None:
        """Makes the mistake in a copy of the project. Raises DoesNotApply."""
        path = tree / PACKAGE / self.path
        path.write_text(self.mutated(path.read_text()))

    def mutated(self, text: str) -> str:
        """The file's text with the mistake. Raises DoesNotApply."""
        old, new = self.old.removeprefix("\n"), self.new.removeprefix("\n")
        count = text.count(old)
        if count != 1:
            raise DoesNotApply(f"mutant {self.name}: its text occurs {count} times in {self.path}, not once")
        return text.replace(old, new)
