"""`python -m tests.soak`: runs a soak and says what came of it. Status 1 for a wrong byte or an unexpected failure."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.soak.daemon import UnexpectedError
from tests.soak.driver import Settings, Soak
from tests.soak.readers import WrongError, missing_programs

_LINE_EVERY_S = 10.0
_INTERRUPTED = 130  # as shells tell of SIGINT


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Soaks a real daemon, and judges it.")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long [default: 5]")
    parser.add_argument("--seed", type=int, help="of what is done when [default: a new one]")
    parser.add_argument("--dir", help="where to work, a new directory in it [default: the temporary directory]")
    options = parser.parse_args()
    if missing := missing_programs():
        parser.error(f"not installed: {', '.join(missing)}; run scripts/install-peers")
    seed = options.seed if options.seed is not None else secrets.randbelow(1 << 32)
    directory = Path(tempfile.mkdtemp(prefix="soak-", dir=options.dir)).resolve()
    print(f"soak: seed {seed}, {options.minutes:g} minutes, in {directory}", flush=True)
    return soak(Settings(options.minutes * 60, seed), directory, _reporter())


def soak(settings: Settings, directory: Path, report: Callable[[str], None]) -> int:
    """Runs one soak in `directory`, which is kept if anything was wrong. Returns the exit status."""
    run = Soak(settings, directory, report)
    status, verdict = 0, ""
    try:
        asyncio.run(_until_terminated(run))
    except WrongError as error:
        status, verdict = 1, f"WRONG: {error}"
    except UnexpectedError as error:
        status, verdict = 1, f"FAILED: {error}"
    except (KeyboardInterrupt, asyncio.CancelledError):
        status, verdict = _INTERRUPTED, "interrupted"
    print(f"\nsoak: {run.tally.line()}\nsoak: {run.totals()}", flush=True)
    if status == 1:
        (directory / "verdict.txt").write_text(f"seed {settings.seed}\n{verdict}\n")
        verdict += f"\nsoak: seed {settings.seed}; the evidence is in {directory}"
    else:
        shutil.rmtree(directory)
    if verdict:
        print(f"soak: {verdict}", flush=True)
    return status


async def _until_terminated(run: Soak) -> None:
    """SIGTERM ends the soak as Ctrl-C does: in order, with no process left."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await run.run()


def _reporter() -> Callable[[str], None]:
    """Shows a line: over the last one on a terminal, else one in a while."""
    last_s = 0.0

    def report(line: str) -> None:
        nonlocal last_s
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        elif time.monotonic() - last_s > _LINE_EVERY_S:
            last_s = time.monotonic()
            print(line, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
