"""Seconds of one optimizer step, with hive_scale and others.

Contenders take turns, round by round, in the same processes: other load on the machine affects all alike, so ratios
are reliable where seconds are not. Before any timing they must agree on the loss.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.peers import accelerate, bare, ours
from benchmarks.table import describe_machine, show, spread
from benchmarks.task import CASES, Step, Task, make_data, make_task
from benchmarks.trainer import trainer
from benchmarks.workers import launch
from hive_scale.strict_json import dumps

HELP = "seconds per optimizer step, ours and others'"
WARMUP = 3
CONTENDERS: dict[str, Callable[[Task], Step]] = {
    "ours": ours,
    "bare loop": bare,
    "Accelerate": accelerate,
    "Trainer": trainer,
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes of every case but the first (default 2)")
    parser.add_argument("--steps", type=int, default=2, help="steps per contender and round (default 2)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # internal: the result of one rank


def run(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        measure(arguments)
        return
    rows: list[list[str]] = []
    machine = ""
    for case in arguments.cases:
        ranks = 1 if case == "one" else arguments.ranks
        title = CASES[case][0] + (f", {ranks} ranks" if ranks > 1 else "")
        words = ["engines", "--cases", case, "--rounds", str(arguments.rounds), "--steps", str(arguments.steps)]
        words += ["--quick"] if arguments.quick else []
        with TemporaryDirectory() as folder:
            # one malloc arena: otherwise Trainer's thread would get its own memory, with its own page faults
            result = launch(words, ranks, Path(folder, "result.json"), MALLOC_ARENA_MAX="1")
        machine = result.get("machine", machine)
        rows += (found := compare(title, result["seconds"], result["reasons"]))
        print("\n".join(" | ".join(row) for row in found), file=sys.stderr, flush=True)  # a later case may fail
    columns = ("sharding", "ours, s", "peer", "peer, s", "ours / peer", "quartiles")
    show(columns, rows, f"{machine}; {arguments.rounds} rounds of {arguments.steps} steps", arguments.markdown)


def compare(title: str, seconds: Mapping[str, Sequence[float]], reasons: Mapping[str, str]) -> list[list[str]]:
    ours = seconds["ours"]
    rows = []
    for peer, theirs in seconds.items():
        if peer != "ours":
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            figures = f"{median(theirs):.3f}", f"{median(ratios):.3f}", spread(ratios)
            rows.append([title, f"{median(ours):.3f}", peer, *figures])
    return rows + [[title, "", peer, "-", "-", reason] for peer, reason in reasons.items()]


def measure(arguments: argparse.Namespace) -> None:
    """Time the contenders of one case in turn, and write rank 0's figures."""
    import torch

    from hive_scale.distributed import session

    with session() as world:
        task = make_task(CASES[arguments.cases[0]], world, arguments.quick)
        data = make_data(task)
        steps, reasons = {}, {}
        for name, make in CONTENDERS.items():
            try:
                steps[name] = make(task)
            except NotImplementedError as error:
                reasons[name] = str(error)
        for _ in range(WARMUP):
            agree({name: step(data[0]) for name, step in steps.items()})
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        names = list(steps)
        for index in range(arguments.rounds):
            first = index % len(names)  # rotate, so that no contender always follows the same other
            for name in names[first:] + names[:first]:
                world.barrier()
                began = perf_counter()
                for number in range(arguments.steps):
                    steps[name](data[number % len(data)])
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                world.barrier()
                seconds[name].append((perf_counter() - began) / arguments.steps)
        if world.is_main:
            result = {"seconds": seconds, "reasons": reasons, "machine": describe_machine()}
            arguments.worker.write_text(dumps(result))
        world.barrier()
    sys.stdout.flush()
    os._exit(0)  # Trainer's thread still waits for another step


def agree(losses: Mapping[str, float]) -> None:
    for name, loss in losses.items():
        assert abs(loss / losses["ours"] - 1) < 1e-4, f"{name} does other work: {dict(losses)}"
