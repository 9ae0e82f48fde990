"""Run every command whose table the README shows, and put the new table in its place.

A table stands between ``<!-- benchmark WORDS -->`` and ``<!-- end -->``, WORDS being those of this launcher.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from time import monotonic

from benchmarks.workers import LAUNCHER

HELP = "every table of the README, made again in its place"
README = LAUNCHER.parents[1] / "README.md"
TABLE = re.compile(r"(<!-- benchmark (?P<words>[^>]*?) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
QUICK_SECONDS, QUICK_ROUNDS = 15 * 60, 2


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=Path, default=README, help="the file with the tables (README.md)")


def run(arguments: argparse.Namespace) -> None:
    """With --quick: two rounds each, and none is begun, or goes on, after 15 minutes; its table then stays."""
    text = arguments.readme.read_text()
    places = list(TABLE.finditer(text))
    if not places:
        raise ValueError(f"{arguments.readme} has no '<!-- benchmark WORDS -->': there is no table to make again")
    deadline = monotonic() + (QUICK_SECONDS if arguments.quick else float("inf"))
    tables: dict[str, str] = {}
    for place in places:
        words = place["words"].split()
        rounds = ["--rounds", str(QUICK_ROUNDS)] if arguments.quick else []
        print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
        if made := _table([*words, *rounds], deadline - monotonic()):
            tables[place["words"]] = made
    arguments.readme.write_text(
        TABLE.sub(lambda place: place[1] + tables.get(place["words"], place["table"]) + place[4], text)
    )
    print(f"{len(tables)} of {len(places)} tables made again in {arguments.readme}")


def _table(words: list[str], seconds: float) -> str | None:
    """What a command prints as Markdown; None if it fails, or has not ended in time."""
    command = [sys.executable, str(LAUNCHER), *words, "--markdown"]
    limit = None if seconds == float("inf") else max(0.0, seconds)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=limit)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"its table stays: {error}", file=sys.stderr)
        return None
    return done.stdout
