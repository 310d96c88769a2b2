"""Keeps the tests that boot a virtual machine out of runs that did not ask for them."""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Whoever wants these says so: `-m guest`."""
    return None if "guest" in config.getoption("markexpr") else True
