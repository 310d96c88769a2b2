"""The documents: they exist, are linked, name things that are there, and say nothing about machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
CODE_PATH = re.compile(r"`((?:src|tests|docs|scripts)/[\w./-]+\.(?:py|md))`")
TEST_NAME = re.compile(r"`(test_\w+)`")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in LINK.findall(text):
        assert (path.parent / target).exists(), f"{path}: {target} does not exist"
    for target in CODE_PATH.findall(text):
        assert (ROOT / target).exists(), f"{path}: {target} does not exist"


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    heap = [ROOT / "README.md"]
    while heap:
        path = heap.pop().resolve()
        if path in seen or path.suffix != ".md":
            continue
        seen.add(path)
        heap += [path.parent / target for target in LINK.findall(path.read_text())]
    assert {path.resolve() for path in DOCUMENTS} <= seen


def test_the_readme_fits_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


def test_every_invariant_names_tests_that_exist() -> None:
    defined = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    text = (ROOT / "docs" / "INVARIANTS.md").read_text()
    entries = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(entries) >= 10
    for entry in entries:
        names = TEST_NAME.findall(entry)
        assert names, f"no test is named for: {entry[:80]}"
        for name in names:
            assert name in defined, f"{name} is not a test"
