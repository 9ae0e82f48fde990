"""Run every command whose table docs/benchmarks.md shows, and replace the table by the new one.

A table stands between ``<!-- benchmark WORDS; quick: WORDS -->`` and ``<!-- end -->``. WORDS are those of this
launcher; the second group, if any, is added with --quick.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

from benchmarks.workers import LAUNCHER

HELP = "every table of docs/benchmarks.md, made again in its place"
PAGE = LAUNCHER.parents[1] / "docs" / "benchmarks.md"
TABLE = re.compile(
    r"(?P<above><!-- benchmark (?P<words>[^>;]*)(; quick: (?P<quick>[^>]*))? -->\n)"
    r"(?P<table>.*?)(?P<below><!-- end -->)",
    re.DOTALL,
)
QUICK_SECONDS, QUICK_ROUNDS = 15 * 60, 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the tables (docs/benchmarks.md)")


def run(arguments: argparse.Namespace) -> None:
    """Run all benchmarks; with --quick, two rounds each within 15 minutes in total.

    No command may take more than a third of the remaining time, or the rest would starve; the table of one that does
    stays as it is.
    """
    text = arguments.page.read_text()
    places = list(TABLE.finditer(text))
    if not places:
        raise ValueError(f"{arguments.page} has no '<!-- benchmark WORDS -->': there is no table to make again")
    deadline = monotonic() + (QUICK_SECONDS if arguments.quick else float("inf"))
    tables: dict[str, str] = {}
    for left, place in zip(range(len(places), 0, -1), places, strict=True):
        words = place["words"].split()
        if arguments.quick:
            words += [*(place["quick"] or "").split(), "--rounds", str(QUICK_ROUNDS)]
        print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
        if made := _table(words, (deadline - monotonic()) / min(left, 3)):
            tables[place["above"]] = made
    arguments.page.write_text(
        TABLE.sub(lambda one: one["above"] + tables.get(one["above"], one["table"]) + one["below"], text)
    )
    print(f"{len(tables)} of {len(places)} tables made again in {arguments.page}")


def _table(words: list[str], seconds: float) -> str | None:
    """Return the Markdown that a command prints; None if it fails or exceeds its time."""
    command = [sys.executable, str(LAUNCHER), *words, "--markdown"]
    limit = None if seconds == float("inf") else max(0.0, seconds)
    # a process group of its own, so that no rank outlives it and disturbs the next benchmark
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            made, _ = running.communicate(timeout=limit)
            reason = f"it ended with code {running.returncode}" if running.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGTERM)  # torchrun passes it on to its ranks
            running.communicate()
            reason = f"{seconds:.0f} seconds were not enough"
    if reason:
        print(f"its table stays: {reason}", file=sys.stderr)
        return None
    return made
