"""The layers, as the architecture draws them: a module imports only from lower ones, or from its own package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fleecer"

LAYERS = {
    "errors": 0.0,
    "units": 0.1,
    "ranges": 0.2,
    "eager": 0.2,
    "trials": 0.1,
    "waiters": 0.2,
    "polling": 0.2,
    "spares": 0.3,
    "wire": 1,
    "formats": 1,
    "storage": 2,
    "net": 2,
    "block": 3,
    "export": 4,
    "jobs": 4,
    "daemon": 5,
    "monitor": 6,
    "app": 7,
    "testing": 7,
    "cli": 8,
}
"""Which layer a top-level module or package is in. `testing` is for users of the rest: nothing imports it."""

PURE = ("wire", "formats")
IMPURE_MODULES = {"asyncio", "os", "socket", "time", "threading", "io", "pathlib", "random", "ssl", "subprocess"}
ONLY_IN_STORAGE = {"pread", "preadv", "pwrite", "pwritev", "fsync", "fdatasync", "posix_fallocate", "ftruncate"}
NOWHERE = {"sendfile", "splice", "mmap", "copy_file_range", "MSG_ZEROCOPY"}
"""Ways of sending bytes that may change after they were "sent"."""


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def place(path: Path) -> str:
    """The top-level module or package a file belongs to; "" for the package's own __init__ and __main__."""
    first = path.relative_to(SOURCE).parts[0]
    return "" if first in ("__init__.py", "__main__.py") else first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            base = node.module or ""
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_below(path: Path) -> None:
    here = place(path)
    if not here:
        return
    for line, name in imports(ast.parse(path.read_text())):
        if name.startswith("fleecer."):
            there = name.split(".")[1]
            if there in LAYERS and there != here:
                assert LAYERS[there] < LAYERS[here], f"{path}:{line}: {here} must not import {name}"
        elif here in PURE:
            assert name.split(".")[0] not in IMPURE_MODULES, f"{path}:{line}: {here} is pure, {name} is not"


def test_every_module_has_a_layer() -> None:
    assert {place(path) for path in modules()} - {""} <= set(LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_bytes_reach_files_only_through_storage_and_leave_only_as_copies(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        is_ours = name == "mmap" and (place(path) == "spares" or path.name == "sends.py")  # memory, the kernel's queues
        assert name not in NOWHERE or is_ours, f"{path}:{node.lineno}: {name} may send bytes that change under way"  # type: ignore[attr-defined]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            allowed = name not in ONLY_IN_STORAGE or place(path) == "storage" or path.name == "rundir.py"
            assert allowed, f"{path}:{node.lineno}: os.{name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_says_what_it_is_for_and_stays_small(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} does not say what it is for"
    assert len(path.read_text().splitlines()) <= 700, f"{path} is too long; split it by idea"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_nothing_is_imported_from_the_tests_or_for_testing_only() -> None:
    for path in modules():
        for line, name in imports(ast.parse(path.read_text())):
            allowed = place(path) == "testing" or not name.startswith("fleecer.testing")
            assert allowed, f"{path}:{line}: {name} is for tests"


def test_every_module_is_used() -> None:
    used = {name for path in modules() for _, name in imports(ast.parse(path.read_text()))}
    for path in modules():
        if path.name in ("__init__.py", "__main__.py") or place(path) == "testing":
            continue
        name = ".".join(("fleecer", *path.relative_to(SOURCE).with_suffix("").parts))
        assert any(other == name or other.startswith(f"{name}.") for other in used), f"nothing imports {name}"
