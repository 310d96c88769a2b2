"""Failures of old, one in a line of corpus.jsonl: none happens again, and each still shows what it was kept for.

`rule` names what was taken out of the program when a line was found (breaks.py); a line without one is a bug that was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.sim.breaks import BREAKS

from fleecer.testing.sim.__main__ import main
from fleecer.testing.sim.cases import Case
from fleecer.testing.sim.exhaust import exhaust_case
from fleecer.testing.sim.shrink import replay

CORPUS = Path(__file__).with_name("corpus.jsonl")
LINES = CORPUS.read_text().splitlines()


def case_of(line: str) -> Case:
    return Case.from_json(json.dumps(json.loads(line)["case"]))


def rule_of(line: str) -> str:
    fields: dict[str, Any] = json.loads(line)
    return str(fields.get("rule", ""))


@pytest.mark.parametrize("line", LINES, ids=range(1, len(LINES) + 1))
def test_a_failure_of_old_does_not_happen_again(line: str) -> None:
    replay(line)


@pytest.mark.parametrize("line", [line for line in LINES if rule_of(line)], ids=rule_of)
def test_a_line_still_shows_what_it_was_kept_for(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By any schedule: the steps of the one that was written down shift whenever the program changes."""
    BREAKS[rule_of(line)](monkeypatch)
    kind = json.loads(line)["was"].partition(":")[0]
    assert exhaust_case(case_of(line), small=False).error.startswith(f"{kind}:")


def test_the_command_replays_the_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", str(CORPUS)]) == 0
    assert capsys.readouterr().out == f"{len(LINES)} failures of old replayed; 0 happen again\n"


def test_the_command_says_which_line_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(next(line for line in LINES if rule_of(line) == "old data is not kept") + "\n")
    BREAKS["old data is not kept"](monkeypatch)
    assert main(["--replay", str(path)]) == 1
    assert capsys.readouterr().out.startswith(f"{path}:1: Violation: snapshot ")
