"""Saving and loading a stage's state, with hive_scale and others: seconds blocked, seconds until durable, bytes,
memory.

Contenders take turns and save the same weights and moments of the same engine. Durable means that every file has
reached the disk: hive_scale syncs and verifies checksums itself; for the others all files are synced afterwards.
Loading reads from the page cache, once with the same number of processes and once with another.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.savers import Saver, compete
from benchmarks.table import describe_machine, peak_bytes, show
from benchmarks.task import CASES, Task, make_task
from benchmarks.workers import launch
from hive_scale.strict_json import dumps

if TYPE_CHECKING:  # imported late at run time, so that --help answers at once
    from torch import Tensor

HELP = "saving and loading, ours and others'"
SHARDINGS = ("zero2", "zero3", "fsdp")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="processes that save (default 2)")
    parser.add_argument("--others", type=int, default=3, help="processes that load it, too (default 3)")
    parser.add_argument("--cases", nargs="+", choices=SHARDINGS, default=list(SHARDINGS), help="default: all")
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # internal: the result of one rank
    parser.add_argument("--load_only", action="store_true", help=argparse.SUPPRESS)  # loads what another world saved


def run(arguments: argparse.Namespace) -> None:
    if arguments.worker:
        measure(arguments)
        return
    rows: list[list[str]] = []
    machine = ""
    for case in arguments.cases:
        with TemporaryDirectory(dir=arguments.directory) as folder:
            words = ["checkpoint", "--cases", case, "--rounds", str(arguments.rounds), "--directory", folder]
            words += ["--quick"] if arguments.quick else []
            here = launch(words, arguments.ranks, Path(folder, "save.json"))
            other = launch([*words, "--load_only"], arguments.others, Path(folder, "load.json"))
        machine = here["machine"]
        found = [row(f"{CASES[case][0]}, {arguments.ranks} ranks", name, here, other) for name in here["found"]]
        print("\n".join(" | ".join(line) for line in found), file=sys.stderr, flush=True)
        rows += found
    columns = (
        "sharding",
        "who",
        "blocked, s",
        "durable, s",
        "MB",
        "peak MB a rank",
        "load, s",
        f"on {arguments.others}, s",
    )
    caption = f"{machine}; {here['numbers'] / 1e6:.0f} M trained parameters, {arguments.rounds} rounds, medians"
    show(columns, rows, caption, arguments.markdown)


def row(title: str, name: str, here: dict[str, Any], other: dict[str, Any]) -> list[str]:
    figures = here["found"][name]
    seconds = [f"{median(figures[what]):.2f}" for what in ("blocked", "durable")]
    sizes = [f"{figures[what] / 1e6:.0f}" for what in ("bytes", "peak")]
    return [title, name, *seconds, *sizes, f"{median(figures['load']):.2f}", other["found"][name]["load"]]


def measure(arguments: argparse.Namespace) -> None:
    """Time the contenders of one case in turn, and write rank 0's figures."""
    from hive_scale.distributed import session

    with session() as world:
        task = larger(make_task(CASES[arguments.cases[0]], world, arguments.quick), arguments.quick)
        savers = compete(task, arguments.directory)
        found: dict[str, Any] = {}
        if arguments.load_only:
            found = {name: {"load": load_elsewhere(task, saver)} for name, saver in savers.items()}
        else:
            for _ in range(arguments.rounds + 1):  # one extra: the first round, which allocates buffers, does not count
                for name, saver in savers.items():
                    figures = found.setdefault(name, {"blocked": [], "durable": [], "load": [], "peak": 0})
                    time_once(task, saver, figures)
            for name, figures in found.items():
                figures |= {what: figures[what][1:] for what in ("blocked", "durable", "load")}
                figures["bytes"] = sum(path.stat().st_size for path in files(savers[name].path))
        if world.is_main:
            dormant = task.model.unused_parameters()
            numbers = sum(p.numel() for name, p in task.model.named_parameters() if name not in dormant)
            result = {"found": found, "numbers": numbers, "machine": describe_machine()}
            arguments.worker.write_text(dumps(result))
        world.barrier()
    sys.stdout.flush()
    os._exit(0)


def time_once(task: Task, saver: Saver, figures: dict[str, Any]) -> None:
    """Save to a fresh place, load, and check that the loaded state equals the saved one."""
    world = task.world
    if world.is_main:
        rmtree(saver.path, ignore_errors=True)
    world.barrier()
    before = fingerprint(saver.state())
    seconds: dict[str, float] = {}

    def save() -> None:
        began = perf_counter()
        saver.save()
        seconds["blocked"] = perf_counter() - began
        saver.finish()
        world.barrier()
        if world.is_main:
            for path in (saver.path, *saver.path.rglob("*")):
                sync(path)
        world.barrier()
        seconds["durable"] = perf_counter() - began

    figures["peak"] = max(figures["peak"], peak_bytes(save, world.device))
    for tensor in saver.state():
        tensor.zero_()
    began = perf_counter()
    saver.load()
    world.barrier()
    seconds["load"] = perf_counter() - began
    assert fingerprint(saver.state()) == before, f"{saver.path.name} has loaded something else"
    for what, value in seconds.items():
        figures[what].append(value)


def load_elsewhere(task: Task, saver: Saver) -> str:
    began = perf_counter()
    try:
        saver.load()
        task.world.barrier()
    except Exception as error:  # peers raise anything for an unexpected world size
        return f"refused ({type(error).__name__})"
    return f"{perf_counter() - began:.2f}"


def fingerprint(tensors: Iterable[Tensor]) -> list[float]:
    return [float(tensor.double().sum()) for tensor in tensors]


def files(path: Path) -> Iterator[Path]:
    return (found for found in path.rglob("*") if found.is_file())


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def larger(task: Task, quick: bool) -> Task:
    """Return the same task with about 100 M parameters, all trained; bf16 compute over fp32 masters."""
    from hive_scale.config import PartConfig
    from hive_scale.model.build import init_model

    sizes = {"hidden_size": 64, "intermediate_size": 192} if quick else {"hidden_size": 640, "intermediate_size": 2560}
    layers = {} if quick else {"num_hidden_layers": 8}
    parts = (PartConfig(config=part.config | sizes | layers) for part in (task.config.vision, task.config.language))
    config = replace(task.config, **dict(zip(("vision", "language"), parts, strict=True)))
    return replace(task, config=config, model=init_model(config, 0), engine=replace(task.engine, precision="bf16"))
