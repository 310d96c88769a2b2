"""What holds for every test, however the suite was started and by whom.

Stop signals are heeded: a shell's `&` and nohup have children ignore some. Tests that need the rights of root are left
out for others, and said to be.
"""

from __future__ import annotations

import os
import signal

import pytest

from fleecer.app.signals import STOP_SIGNALS


def pytest_configure() -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root") is not None:
            item.add_marker(pytest.mark.skip(reason="needs the rights of root: it mounts, or sets up a device"))
