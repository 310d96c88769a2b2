"""The mutants: each can still be made, none is nonsense, and what a run says is understood."""

from __future__ import annotations

import collections
import pathlib

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import PACKAGE, DoesNotApply, Mutant
from tests.mutants.runner import judge, shortened

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_applies_and_is_python(mutant: Mutant) -> None:
    text = (ROOT / PACKAGE / mutant.path).read_text()
    mutated = mutant.mutated(text)
    assert mutated != text
    compile(mutated, mutant.path, "exec")
    assert mutant.breaks


def test_there_are_enough_and_each_is_another() -> None:
    assert len(MUTANTS) >= 40
    for count in (
        collections.Counter(mutant.name for mutant in MUTANTS),
        collections.Counter((mutant.path, mutant.old, mutant.new) for mutant in MUTANTS),
    ):
        assert max(count.values()) == 1


@pytest.mark.parametrize("text", ["", "wait()\nwait()\n"])
def test_a_mutant_whose_text_is_not_there_once_is_an_error(text: str) -> None:
    with pytest.raises(DoesNotApply, match="not once"):
        Mutant("lost", "eager.py", "wait()\n", "", "a rule").mutated(text)


def test_a_mutant_changes_its_text_and_nothing_else(tmp_path: pathlib.Path) -> None:
    path = tmp_path / PACKAGE / "eager.py"
    path.parent.mkdir(parents=True)
    path.write_text("one()\n    wait()\ntwo()\n")
    Mutant("dropped", "eager.py", "\n    wait()\n", "", "a rule").apply(tmp_path)
    assert path.read_text() == "one()\ntwo()\n"


def test_only_a_failure_that_was_found_kills() -> None:
    assert judge(1, "FAILED seed 4: Violation\n", by_tests=False) == ("seed 4: Violation", "")
    assert judge(1, "FAILED a.py::test_b - Violation\n1 failed\n", by_tests=True) == ("a.py::test_b - Violation", "")
    assert judge(0, "nothing found\n", by_tests=False) == ("", "nothing found")
    for status, output, by_tests in [
        (1, "Traceback\nImportError: no\n", False),
        (1, "", False),
        (4, "ERROR: not found\n", True),
        (2, "FAILED half-way\n", True),
        (-24, "", False),
    ]:
        found, problem = judge(status, output, by_tests=by_tests)
        assert not found
        assert problem


def test_long_findings_show_where_and_how_they_end() -> None:
    line = shortened("FAILED seed 4: " + "x" * 500 + " the end")
    assert line.startswith("seed 4: ")
    assert line.endswith(" the end")
    assert len(line) <= 110
