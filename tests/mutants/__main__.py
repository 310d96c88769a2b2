"""`python -m tests.mutants`: which mistakes does the simulation find?

    python -m tests.mutants                     every mutant, on all cores
    python -m tests.mutants --only copier       those whose name or file contains that
    python -m tests.mutants --list              what there is

It prints a table: each mutant, what found it and how, and the processor's seconds that took. One that survives is a
hole in the tests. Exit status 1 if any does, or if something is found in the tree without a mistake.
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import run_mutants


def main(words: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="those whose name or file contains PATTERN")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--list", action="store_true", help="list the mutants and the rules they break")
    options = parser.parse_args(words)
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name or options.only in mutant.path]
    if not chosen:
        parser.error(f"no mutant's name or file contains {options.only!r}")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:<42} {mutant.path:<34} {mutant.breaks}")
        return 0
    killed = failures = 0
    slowest = 0.0
    for outcome in run_mutants(chosen, options.jobs):
        if outcome.is_control:
            if outcome.found or outcome.problem != "nothing found":
                failures += 1
                print(f"{outcome.mutant.name:<42} {outcome.cpu_s:5.1f} s  FAILED: {outcome.found or outcome.problem}")
            else:
                print(f"{outcome.mutant.name:<42} {outcome.cpu_s:5.1f} s  nothing found, as it should be", flush=True)
            continue
        killed += bool(outcome.found)
        slowest = max(slowest, outcome.cpu_s)
        told = outcome.found or f"SURVIVED: {outcome.problem}"
        print(f"{outcome.mutant.name:<42} {outcome.cpu_s:5.1f} s  {told}", flush=True)
    print(f"killed {killed} of {len(chosen)}; the slowest took {slowest:.1f} s of the processor")
    return 1 if failures or killed < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
