"""Time from the command to its first output, and to the first optimizer step of the debug preset."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

from benchmarks.table import describe_machine, show, spread

HELP = "seconds to --help, and to the first step of the debug preset"
PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain.py"
LIMIT = 120.0  # seconds for a first step


def configure(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    ways = {
        "--help": _help,
        "import torch, transformers (no step begins before that)": _imports,
        "first step of --preset debug": _first_step,
    }
    rounds = 1 if arguments.quick else arguments.rounds
    seconds = {title: [way() for _ in range(rounds)] for title, way in ways.items()}
    rows = [[title, f"{median(found):.2f}", spread(found)] for title, found in seconds.items()]
    show(("what", "seconds", "quartiles"), rows, f"{describe_machine()}; {rounds} rounds", arguments.markdown)


def _help() -> float:
    return _seconds(str(PRETRAIN), "--help")


def _imports() -> float:
    return _seconds("-c", "import torch, transformers")


def _seconds(*words: str) -> float:
    began = perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - began


def _first_step() -> float:
    with TemporaryDirectory() as folder:
        metrics = Path(folder, "run", "projector", "metrics.jsonl")
        command = [sys.executable, str(PRETRAIN), "--preset", "debug", f"output={Path(folder, 'run')}", "--quiet"]
        began = perf_counter()
        with subprocess.Popen(command) as running:
            while not (metrics.exists() and metrics.stat().st_size):
                if running.poll() is not None or perf_counter() - began > LIMIT:
                    running.kill()
                    raise ValueError(f"{' '.join(command)} made no step: run it by hand to see why")
                sleep(0.01)
            seconds = perf_counter() - began
            running.kill()
    return seconds
