"""Faults at random instants of whole runs: each run must end with the losses and weights of one left alone.

  python tests/faults/sweep.py --trials 100 --markdown         the table of the README; `make faults`
  python tests/faults/sweep.py --seed 17 --trials 1            one trial again, by its seed

The debug preset's three stages, shortened, run on two ranks under ZeRO-2 and FSDP2 in turn, on shards of which some
samples are broken. A run that ends, for whatever reason, is started again until it is done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import guardian  # noqa: E402
import ranks  # noqa: E402

from hive_scale import presets  # noqa: E402
from hive_scale.checkpoint.handoff import read_weights  # noqa: E402
from hive_scale.checkpoint.marker import WEIGHTS, is_done  # noqa: E402
from hive_scale.data.shards import SAMPLE_DIR  # noqa: E402
from hive_scale.distributed import session  # noqa: E402
from hive_scale.pipeline import run_pipeline  # noqa: E402
from hive_scale.train import Stopped  # noqa: E402
from hive_scale.watch.metrics import read_metrics  # noqa: E402

STAGES = ("projector", "language", "joint")
STEPS = 8  # a stage
ENGINES = {"FSDP2": (), "ZeRO-2": (f"engine.ds_config={ROOT / 'ds_configs' / 'zero2.json'}",)}
TOLERANCE = 1e-6  # of losses, relative, for the same engine and number of ranks
LIMIT = 120.0  # seconds for one attempt
FROZEN = 20.0  # seconds in which a rank that is not frozen ends after another has failed
ATTEMPTS = 6
DAY = 86400


@dataclass
class Attempt:
    """Two ranks at work on the run in `folder`."""

    folder: Path
    processes: list[BaseProcess]
    clock: Any  # seconds by which the ranks' wall clocks are wrong

    def steps(self) -> int:
        """Steps on record, of all stages."""
        return sum(len(read_metrics(self.folder / "run" / stage / "metrics.jsonl")) for stage in STAGES)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid and process.is_alive()]

    def end(self) -> list[int | None]:
        """Exit codes, when all have ended; a rank that outlives another's failure for long is killed, as frozen."""
        deadline = time.monotonic() + LIMIT
        while self.pids() and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + FROZEN)
            time.sleep(0.05)
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]


def member(rank: int, port: int, words: list[str], folder: Path, clock: Any) -> None:
    """One rank, as a launcher would start it."""
    with (folder / f"said_{rank}").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    real = time.time
    time.time = lambda: real() + clock.value
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    code = 0
    with session() as world:
        try:
            run_pipeline(presets.load("debug", None, words), world, patience=10)
        except Stopped:
            code = 75
    os._exit(code)


@contextmanager
def attempt(folder: Path, engine: str) -> Iterator[Attempt]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        *(f"output={folder / 'run'}", "save_interval=3", "hang_seconds=15", *ENGINES[engine]),
        *(f"data.train=[{folder.parent}/broken-*.tar]", "eval_interval=0"),
        *(f"stages.{stage}.{key}" for stage in STAGES for key in (f"steps={STEPS}", "global_batch=16")),
    ]
    clock = ranks.CONTEXT.Value("d", 0.0)
    processes = [ranks.CONTEXT.Process(target=member, args=(rank, port, words, folder, clock)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        yield Attempt(folder, processes, clock)
    finally:
        for process in processes:
            process.kill()
            process.join()


# ---------------------------------------------------------------- faults: what is done at the chosen instant

Fault = Callable[[Attempt, random.Random], object]


def signal_one(number: int) -> Fault:
    return lambda run, draw: os.kill(draw.choice(run.pids()), number)


def signal_all(number: int) -> Fault:
    return lambda run, draw: [os.kill(pid, number) for pid in run.pids()]


def kill_and_damage(run: Attempt, draw: random.Random) -> None:
    """End all, then flip a byte in, cut or remove a file of the newest checkpoint, where there are two."""
    signal_all(signal.SIGKILL)(run, draw)
    for stage in reversed(STAGES):
        checkpoints = sorted((run.folder / "run" / stage).glob("step_????????"))
        if len(checkpoints) > 1:
            path = draw.choice([path for path in checkpoints[-1].iterdir() if path.is_file()])
            content = bytearray(path.read_bytes())
            kind = draw.choice(("flip", "cut", "remove"))
            if kind == "flip":
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(content if kind == "flip" else content[: len(content) // 2])
            if kind == "remove":
                path.unlink()
            return


def fill_disk(run: Attempt, draw: random.Random) -> None:
    """Nothing larger than a few kB can be written any more."""
    for pid in run.pids():
        prlimit(pid, RLIMIT_FSIZE, (draw.randrange(100, 4000), RLIM_INFINITY))


def slow_one(run: Attempt, draw: random.Random) -> None:
    """One rank has a tenth of its time, for some seconds."""
    pid = draw.choice(run.pids())
    until = time.monotonic() + 8
    while run.alive() and time.monotonic() < until:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.18)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)


def jump_clock(run: Attempt, draw: random.Random) -> None:
    run.clock.value = draw.choice((-DAY, -3600, 3600, DAY))


def lose_shard(run: Attempt, draw: random.Random) -> None:
    """End all, once the run has begun; the next attempt finds a shard missing, the one after finds it again."""
    while run.alive() and not (run.folder / "run" / "data.json").exists():
        time.sleep(0.02)
    signal_all(signal.SIGKILL)(run, draw)
    run.end()
    if is_done(run.folder / "run" / STAGES[-1]):
        return  # a run that has ended misses nothing
    shard = next(run.folder.parent.glob("broken-*.tar"))
    away = shard.rename(shard.with_suffix(".away"))
    engine = (run.folder / "engine").read_text()
    with attempt(run.folder, engine) as without:
        codes = without.end()
    away.rename(shard)
    if not any(codes):
        raise AssertionError("a run whose shard is missing ended well")


FAULTS: dict[str, Fault] = {
    "SIGTERM to one rank": signal_one(signal.SIGTERM),
    "SIGUSR1 to one rank": signal_one(signal.SIGUSR1),
    "SIGUSR2 to all ranks": signal_all(signal.SIGUSR2),
    "SIGINT to all ranks": signal_all(signal.SIGINT),
    "kill -9 of one rank": signal_one(signal.SIGKILL),
    "kill -9 of all ranks": signal_all(signal.SIGKILL),
    "kill -9, newest checkpoint damaged": kill_and_damage,
    "kill -9, a shard gone for a while": lose_shard,
    "disk full": fill_disk,
    "one rank ten times slower": slow_one,
    "one rank frozen": signal_one(signal.SIGSTOP),
    "wall clock jumps": jump_clock,
}


# ---------------------------------------------------------------- trials


@dataclass
class Result:
    engine: str
    fault: str
    wrong: str = ""  # how the run differs from the one left alone
    attempts: int = 1
    lost: int = 0  # steps done more than once
    seconds: float = 0.0
    codes: list[list[int | None]] = field(default_factory=list)


def trial(place: Path, seed: int, alone: Mapping[str, Path], fault: str = "", engine: str = "") -> Result:
    """One run with one fault; `alone` are runs by engine that were left alone."""
    draw = random.Random(seed)
    names = list(FAULTS)
    result = Result(engine or list(ENGINES)[seed % 2], fault or names[(seed // 2) % len(names)])
    folder = place / f"trial_{seed}"
    folder.mkdir()
    (folder / "engine").write_text(result.engine)
    began = time.monotonic()
    with attempt(folder, result.engine) as run:
        wait_for(run, draw.randrange(0, STEPS * len(STAGES)), draw.uniform(0, 0.3))
        if run.alive():
            FAULTS[result.fault](run, draw)
        result.codes.append(run.end())
    while any(result.codes[-1]) and len(result.codes) < ATTEMPTS:
        with attempt(folder, result.engine) as run:
            result.codes.append(run.end())
    result.attempts = len(result.codes)
    result.wrong = difference(folder / "run", alone[result.engine]) if not any(result.codes[-1]) else "never ended well"
    lines = [read_metrics(folder / "run" / stage / "metrics.jsonl") for stage in STAGES]
    result.lost = sum(stage[-1]["lost_steps"] for stage in lines if stage)
    asked = result.fault.startswith("SIG")
    if not result.wrong and asked and result.lost:
        result.wrong = "a signal cost steps"
    result.seconds = time.monotonic() - began
    if not result.wrong:
        shutil.rmtree(folder)
    return result


def wait_for(run: Attempt, steps: int, seconds: float) -> None:
    deadline = time.monotonic() + LIMIT
    while run.alive() and run.steps() < steps and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)


def difference(run: Path, alone: Path) -> str:
    """How `run` differs from `alone` in losses or final weights, or ""."""
    for stage in STAGES:
        ours, theirs = (read_metrics(place / stage / "metrics.jsonl") for place in (run, alone))
        if [line["step"] for line in ours] != list(range(1, STEPS + 1)):
            return f"{stage} has steps {[line['step'] for line in ours]}"
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
        if not worst <= TOLERANCE:
            return f"{stage}: losses differ by {worst:.1e}"
    ours, theirs = (read_weights(place / STAGES[-1] / WEIGHTS) for place in (run, alone))
    far = max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())
    return f"weights differ by {far:.1e}" if far > TOLERANCE else ""


def broken_shards(place: Path) -> None:
    """The shipped shards, with some bytes overwritten inside pictures: every run meets samples it cannot decode."""
    draw = random.Random(0)
    for path in SAMPLE_DIR.glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        for _ in range(12):
            at = draw.randrange(len(content) // 512) * 512 + 40
            if content[at : at + 40].strip(b"\0") and b"ustar" not in content[at - 40 : at + 512]:
                content[at : at + 40] = bytes(40)
        (place / f"broken-{path.name}").write_bytes(content)


def left_alone(place: Path, engines: set[str]) -> dict[str, Path]:
    broken_shards(place)
    runs = {}
    for engine in sorted(engines):
        folder = place / f"alone_{engine}"
        folder.mkdir()
        with attempt(folder, engine) as run:
            codes = run.end()
        if any(codes):
            raise RuntimeError(f"the run left alone ended with {codes}: see {folder}/said_0")
        runs[engine] = folder / "run"
    return runs


def table(results: list[Result]) -> str:
    """In Markdown: trials, faults, steps lost, ended well."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.fault].append(result)
    rows = ["| fault | trials | starts, at most | steps lost, mean | at most | ended well |", "| --- " * 6 + "|"]
    for fault, group in groups.items():
        lost = [result.lost for result in group]
        well = sum(not result.wrong for result in group)
        rows.append(
            f"| {fault} | {len(group)} | {max(result.attempts for result in group)} | {sum(lost) / len(lost):.1f} | "
            f"{max(lost)} | {well} of {len(group)} |"
        )
    well = sum(not result.wrong for result in results)
    return "\n".join([*rows, f"| all | {len(results)} | | | | {well} of {len(results)} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--markdown", action="store_true", help="end with a table")
    parser.add_argument("--results", type=Path, help="append each result to this file, as JSON")
    arguments = parser.parse_args()
    guardian.watch()
    place = Path(tempfile.mkdtemp(prefix="faults_"))
    alone = left_alone(place, set(ENGINES))
    results = []
    for seed in range(arguments.seed, arguments.seed + arguments.trials):
        result = trial(place, seed, alone)
        results.append(result)
        print(f"{seed}: {vars(result)}", flush=True)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(json.dumps({"seed": seed, **vars(result)}) + "\n")
    if arguments.markdown:
        print(table(results))
    if failed := [result for result in results if result.wrong]:
        print(f"{len(failed)} runs ended wrong; they are kept in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
