"""Faults at random instants of whole runs: each run must end with the losses and weights of one left alone.

  python tests/faults/sweep.py --trials 200 --markdown         the table of docs/failures.md; `make faults`
  python tests/faults/sweep.py --seed 17 --trials 1            one trial again, by its seed
  python tests/faults/sweep.py --trials 8 --fault "EIO at a write"

The debug preset's three stages, shortened, run under one of five set-ups (FSDP2, ZeRO-2, ZeRO-3 with offload, three
ranks, HSDP), on shards of which some samples are broken. A run that ends, for whatever reason, is started again until
it is done.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import guardian  # noqa: E402
import ranks  # noqa: E402
from server import WRONGS, Server, serve  # noqa: E402

from hive_scale import presets  # noqa: E402
from hive_scale.checkpoint.stage_files import WEIGHTS, is_stage_done  # noqa: E402
from hive_scale.checkpoint.weights import read_weights  # noqa: E402
from hive_scale.data.shards import SAMPLE_DIR  # noqa: E402
from hive_scale.distributed import session  # noqa: E402
from hive_scale.exit_codes import Stopped  # noqa: E402
from hive_scale.observability.metrics import read_metrics  # noqa: E402
from hive_scale.pipeline import run_pipeline  # noqa: E402
from hive_scale.strict_json import read_lines  # noqa: E402

STAGES = ("projector", "language", "joint")
STEPS = 8  # a stage
TOLERANCE = 1e-6  # of losses, relative, and of weights, for the same engine and number of ranks
MIXED = 1e-5  # where these change in mid-run
# of weights, where features come from the cache: the run left alone has its encoder at work, whose linear layers ZeRO-3
# replaces by its own, which round otherwise, and Adam makes a whole step of the sign of a gradient near zero
CACHED = 1e-3
LIMIT = 120.0  # seconds for one attempt
FROZEN = 20.0  # seconds in which a rank that is not frozen ends after another has failed
ATTEMPTS = 6
DAY = 86400
INJECTOR = "HIVE_SCALE_FAULTS_INJECTOR"  # variable: the library made of writes.c, which is loaded


@dataclass(frozen=True)
class Setup:
    """How many ranks, and under which engine; 24 samples a step, in micro-batches that these divide."""

    ranks: int
    words: tuple[str, ...] = ()


def ds_config(name: str) -> tuple[str, ...]:
    return (f"engine.ds_config={ROOT / 'ds_configs' / name}.json",)


SETUPS = {
    "FSDP2": Setup(2),
    "ZeRO-2": Setup(2, ds_config("zero2")),
    "FSDP2, three ranks": Setup(3),
    "HSDP, four ranks": Setup(4, ("engine.shard_size=2",)),
    "ZeRO-3, offload": Setup(2, ds_config("zero3_offload")),
}


@dataclass(frozen=True)
class FailedWrites:
    """Of one rank's writes to the run, those from number `first` on fail, `count` of them, with `error`."""

    rank: int
    first: int
    error: int
    count: int


@dataclass
class Attempt:
    """Ranks at work on the run in `folder`."""

    folder: Path
    processes: list[BaseProcess]
    clock: Any  # seconds by which the ranks' wall clocks are wrong
    server: Server | None

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


def member(
    rank: int, size: int, port: int, words: list[str], folder: Path, clock: Any, failed: FailedWrites | None
) -> None:
    """One rank, as a launcher would start it."""
    with (folder / f"said_{rank}").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    real = time.time
    time.time = lambda: real() + clock.value
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(folder / "cache"), no_proxy="*")
    if failed and failed.rank == rank:
        parts = (ctypes.c_long(failed.first), ctypes.c_long(failed.count), failed.error)
        ctypes.CDLL(os.environ[INJECTOR]).fail_writes(str(folder / "run").encode(), *parts)
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
def attempt(
    folder: Path,
    setup: str,
    more: tuple[str, ...] = (),
    server: Server | None = None,
    failed: FailedWrites | None = None,
    clock_off: float = 0.0,
) -> Iterator[Attempt]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shards = sorted(folder.parent.glob("broken-*.tar"))
    named = [f"{server.address}/{shard.name}" for shard in shards] if server else [str(shard) for shard in shards]
    size = SETUPS[setup].ranks
    words = [
        *(
            f"output={folder / 'run'}",
            "save_interval=3",
            "watchdog_seconds=15",
            "eval_interval=0",
            *SETUPS[setup].words,
        ),
        *(f"data.train=[{','.join(named)}]", "log.wandb=off", "blank_image_control=false", *more),
        *(
            f"stages.{stage}.{key}"
            for stage in STAGES
            for key in (f"steps={STEPS}", "global_batch=24", f"micro_batch={12 // size}")
        ),
    ]
    clock = ranks.CONTEXT.Value("d", clock_off)
    processes = [
        ranks.CONTEXT.Process(target=member, args=(rank, size, port, words, folder, clock, failed))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        yield Attempt(folder, processes, clock, server)
    finally:
        for process in processes:
            process.kill()
            process.join()


# ---------------------------------------------------------------- instants: when the fault strikes


def at_a_step(run: Attempt, draw: random.Random) -> None:
    steps = draw.randrange(0, STEPS * len(STAGES))
    wait_for(run, lambda: run.steps() >= steps)
    time.sleep(draw.uniform(0, 0.3))


def in_start_up(run: Attempt, draw: random.Random) -> None:
    time.sleep(draw.uniform(0, 3.0))


def between_stages(run: Attempt, draw: random.Random) -> None:
    """While a stage publishes what it has learned, or just after."""
    stage = run.folder / "run" / draw.choice(STAGES)
    last = stage / f"step_{STEPS:08d}"
    wait_for(run, draw.choice((lambda: len(read_metrics(stage / "metrics.jsonl")) >= STEPS, last.exists)))
    time.sleep(draw.uniform(0, 0.4))


def in_features(run: Attempt, draw: random.Random) -> None:
    wait_for(run, lambda: any((run.folder / "features").glob("*")))
    time.sleep(draw.uniform(0, 0.5))


def once_begun(run: Attempt, draw: random.Random) -> None:
    wait_for(run, lambda: (run.folder / "run" / "data.json").exists())


def wait_for(run: Attempt, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while run.alive() and not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


# ---------------------------------------------------------------- faults: what is done at that instant

Strike = Callable[[Attempt, random.Random], object]


@dataclass(frozen=True)
class Fault:
    """`strike` is done to the first attempt at the instant `when`; `words` are what a run needs to meet it."""

    strike: Strike = lambda run, draw: None
    when: Strike = at_a_step
    words: tuple[str, ...] = ()
    writes: tuple[int, int] | None = None  # error, and how many writes fail
    remote: bool = False
    changes: bool = False  # engine and number of ranks, at each start
    clock_off: float = 0.0  # of the second attempt on, seconds


def signal_one(number: int) -> Strike:
    return lambda run, draw: os.kill(draw.choice(run.pids()), number)


def signal_all(number: int) -> Strike:
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
    signal_all(signal.SIGKILL)(run, draw)
    run.end()
    if is_stage_done(run.folder / "run" / STAGES[-1]):
        return  # a run that has ended misses nothing
    shard = next(run.folder.parent.glob("broken-*.tar"))
    away = shard.rename(shard.with_suffix(".away"))
    setup = (run.folder / "setup").read_text()
    with attempt(run.folder, setup) as without:
        codes = without.end()
    away.rename(shard)
    if not any(codes):
        raise AssertionError("a run whose shard is missing ended well")


def kill_worker(run: Attempt, draw: random.Random) -> None:
    """A process that loads data for one of the ranks."""
    children = [
        int(child) for pid in run.pids() for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]
    if children:
        with suppress(ProcessLookupError):
            os.kill(draw.choice(children), signal.SIGKILL)


def damage_features(run: Attempt, draw: random.Random) -> None:
    """Lose, cut or change a file of the feature cache under the running ranks; then end them."""
    files = sorted(path for path in (run.folder / "features").rglob("*") if path.is_file() and path.stat().st_size)
    if files:
        path = draw.choice(files)
        kind = draw.choice(("remove", "cut", "flip"))
        if kind == "remove":
            path.unlink()
        elif kind == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b") as file:
                file.seek(at := draw.randrange(path.stat().st_size))
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    time.sleep(draw.uniform(0, 2))
    signal_all(signal.SIGKILL)(run, draw)


def misbehave(wrong: str) -> Strike:
    """End all, empty the cache of shards, and let the server answer the next requests of the next attempt badly."""

    def strike(run: Attempt, draw: random.Random) -> None:
        signal_all(signal.SIGKILL)(run, draw)
        run.end()
        shutil.rmtree(run.folder / "cache" / "hive_scale" / "shards", ignore_errors=True)
        assert run.server
        run.server.wrong, run.server.times = wrong, draw.randint(1, 3)

    return strike


FEATURES = ("feature_cache={folder}/features",)
FAULTS: dict[str, Fault] = {
    "SIGTERM to one rank": Fault(signal_one(signal.SIGTERM)),
    "SIGUSR1 to one rank": Fault(signal_one(signal.SIGUSR1)),
    "SIGUSR2 to all ranks": Fault(signal_all(signal.SIGUSR2)),
    "SIGINT to all ranks": Fault(signal_all(signal.SIGINT)),
    "kill -9 of one rank": Fault(signal_one(signal.SIGKILL)),
    "kill -9 of all ranks": Fault(signal_all(signal.SIGKILL)),
    "kill -9, newest checkpoint damaged": Fault(kill_and_damage),
    "kill -9, a shard gone for a while": Fault(lose_shard, once_begun),
    "kill -9 of one rank in start-up": Fault(signal_one(signal.SIGKILL), in_start_up),
    "kill -9 of one rank between stages": Fault(signal_one(signal.SIGKILL), between_stages),
    "kill -9 of one rank, evaluation at every step": Fault(signal_one(signal.SIGKILL), words=("eval_interval=1",)),
    "kill -9 of one rank in the feature pass": Fault(signal_one(signal.SIGKILL), in_features, FEATURES),
    "kill -9, feature cache damaged": Fault(damage_features, in_features, FEATURES),
    "kill -9 of a data worker": Fault(kill_worker, words=("data.workers=1",)),
    "kill -9, then the clock a day back": Fault(signal_all(signal.SIGKILL), clock_off=-DAY),
    "kill -9, another engine and world each time": Fault(signal_all(signal.SIGKILL), changes=True),
    "disk full": Fault(fill_disk),
    "ENOSPC at a write": Fault(writes=(errno.ENOSPC, 1)),
    "ENOSPC from a write on": Fault(writes=(errno.ENOSPC, 1 << 40)),
    "EIO at a write": Fault(writes=(errno.EIO, 1)),
    "one rank ten times slower": Fault(slow_one),
    "one rank frozen": Fault(signal_one(signal.SIGSTOP)),
    "wall clock jumps": Fault(jump_clock),
    **{f"server: {wrong}": Fault(misbehave(wrong), once_begun, remote=True) for wrong in WRONGS},
    "export killed": Fault(),  # which is no run: see `killed_export`
}
WRITES = (580, 27)  # that rank 0, or rank 1, makes to a run left alone, about


# ---------------------------------------------------------------- trials


@dataclass
class Result:
    setup: str
    fault: str
    wrong: str = ""  # how the run differs from the one left alone
    attempts: int = 1
    lost: int = 0  # steps done more than once
    seconds: float = 0.0
    codes: list[list[int | None]] = field(default_factory=list)


def trial(place: Path, seed: int, alone: Mapping[str, Path], fault: str = "", setup: str = "") -> Result:
    """One run with one fault; `alone` are runs by set-up that were left alone."""
    draw = random.Random(seed)
    names = list(FAULTS)
    result = Result(setup or draw.choice(list(alone)), fault or names[seed % len(names)])
    folder = place / f"trial_{seed}"
    folder.mkdir()
    began = time.monotonic()
    if result.fault == "export killed":
        killed_export(folder, alone[result.setup], draw, result)
    else:
        disturbed_run(folder, alone, draw, result)
    result.seconds = time.monotonic() - began
    if not result.wrong:
        shutil.rmtree(folder)
    return result


def disturbed_run(folder: Path, alone: Mapping[str, Path], draw: random.Random, result: Result) -> None:
    fault, setup = FAULTS[result.fault], result.setup
    (folder / "setup").write_text(setup)
    words = tuple(word.format(folder=folder) for word in fault.words)
    failed = None
    if fault.writes:
        rank = draw.choice((0, 0, 0, 1))
        failed = FailedWrites(rank, draw.randrange(WRITES[rank]), *fault.writes)
    with ExitStack() as stack:
        server = stack.enter_context(serve(folder.parent)) if fault.remote else None
        with attempt(folder, setup, words, server, failed) as run:
            fault.when(run, draw)
            if run.alive():
                fault.strike(run, draw)
            result.codes.append(run.end())
        while any(result.codes[-1]) and len(result.codes) < ATTEMPTS:
            if fault.changes:
                setup = draw.choice(list(alone))
            with attempt(folder, setup, words, server, clock_off=fault.clock_off) as run:
                if fault.changes and len(result.codes) < 3:
                    at_a_step(run, draw)
                    fault.strike(run, draw)
                result.codes.append(run.end())
    result.attempts = len(result.codes)
    losses = MIXED if fault.changes else TOLERANCE
    weights = CACHED if fault.words is FEATURES else 10 * losses
    ended = not any(result.codes[-1])
    result.wrong = difference(folder / "run", alone[result.setup], losses, weights) if ended else "never ended well"
    lines = [read_metrics(folder / "run" / stage / "metrics.jsonl") for stage in STAGES]
    result.lost = sum(stage[-1]["lost_steps"] for stage in lines if stage)
    if not result.wrong and result.fault.startswith("SIG") and result.lost:
        result.wrong = "a signal cost steps"


def killed_export(folder: Path, alone: Path, draw: random.Random, result: Result) -> None:
    """Kill an export at a random instant: it is there whole, or not at all and is made again."""
    whole = alone.parent / "export"
    command = [sys.executable, "-m", "hive_scale", "export", "hive", str(alone), "--output"]
    options: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    if not whole.exists():
        subprocess.run([*command, str(whole)], check=True, **options)
    out = folder / "export"
    process = subprocess.Popen([*command, str(out)], **options)
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=draw.uniform(2, 7))
    process.kill()
    process.communicate()
    result.codes.append([process.returncode])
    if not out.exists():
        again = subprocess.run([*command, str(out)], check=False, **options)
        result.codes.append([again.returncode])
        if again.returncode:
            result.wrong = again.stderr[-500:]
            return
    result.attempts = len(result.codes)
    found, wanted = (sorted(path.relative_to(one) for path in one.rglob("*")) for one in (out, whole))
    if found != wanted:
        result.wrong = f"the export holds {found}, not {wanted}"
        return
    changed = [path for path in wanted if (whole / path).is_file() and other(whole / path, out / path)]
    result.wrong = f"other bytes in {changed}" if changed else ""


def other(one: Path, two: Path) -> bool:
    """Whether the files differ; a model card says when it was made."""
    return one.name != "README.md" and one.read_bytes() != two.read_bytes()


def difference(run: Path, alone: Path, losses: float = TOLERANCE, weights: float = 10 * TOLERANCE) -> str:
    """How `run` differs from `alone` in losses, relative, or final weights, or ""."""
    for stage in STAGES:
        ours, theirs = (read_metrics(place / stage / "metrics.jsonl") for place in (run, alone))
        if [line["step"] for line in ours] != list(range(1, STEPS + 1)):
            return f"{stage} has steps {[line['step'] for line in ours]}"
        worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
        if not worst <= losses:
            return f"{stage}: losses differ by {worst:.1e}"
    ours, theirs = (read_weights(place / STAGES[-1] / WEIGHTS) for place in (run, alone))
    far = max(float((ours[name] - tensor).abs().max()) for name, tensor in theirs.items())
    return f"weights differ by {far:.1e}" if far > weights else ""


def broken_shards(place: Path) -> None:
    """The shipped shards, with some bytes overwritten inside images: every run meets samples it cannot decode."""
    draw = random.Random(0)
    for path in SAMPLE_DIR.glob("train-*.tar"):
        content = bytearray(path.read_bytes())
        for _ in range(12):
            at = draw.randrange(len(content) // 512) * 512 + 40
            if content[at : at + 40].strip(b"\0") and b"ustar" not in content[at - 40 : at + 512]:
                content[at : at + 40] = bytes(40)
        (place / f"broken-{path.name}").write_bytes(content)


def left_alone(place: Path, setups: Collection[str]) -> dict[str, Path]:
    broken_shards(place)
    runs = {}
    for number, setup in enumerate(setups):
        folder = place / f"alone_{number}"
        folder.mkdir()
        with attempt(folder, setup) as run:
            codes = run.end()
        if any(codes):
            raise RuntimeError(f"the run left alone ended with {codes}: see {folder}/said_0")
        runs[setup] = folder / "run"
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


def earlier(file: Path | None) -> dict[int, Result]:
    """Results by seed that a sweep, which may have been interrupted, has left in `file`."""
    lines = read_lines(file)[0] if file else []
    return {line["seed"]: Result(**{name: value for name, value in line.items() if name != "seed"}) for line in lines}


def with_injector() -> None:
    """Start this program again with the library of writes.c loaded, which every rank inherits."""
    if INJECTOR in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="injector_")) / "writes.so"
    source = Path(__file__).with_name("writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"], check=True)
    os.environ.update({INJECTOR: str(library), "LD_PRELOAD": str(library)})
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--fault", default="", choices=FAULTS, metavar="NAME", help="this one only")
    parser.add_argument("--setups", nargs="+", default=[*SETUPS], choices=SETUPS, metavar="NAME", help="default: all")
    parser.add_argument("--markdown", action="store_true", help="end with a table")
    parser.add_argument("--results", type=Path, help="append each to this file, and run no seed twice")
    arguments = parser.parse_args()
    with_injector()
    guardian.watch()
    place = Path(tempfile.mkdtemp(prefix="faults_"))
    alone = left_alone(place, arguments.setups)
    done = earlier(arguments.results)
    for seed in range(arguments.seed, arguments.seed + arguments.trials):
        if seed in done:
            continue
        done[seed] = result = trial(place, seed, alone, arguments.fault)
        print(f"{seed}: {vars(result)}", flush=True)
        if arguments.results:
            with arguments.results.open("a") as file:
                file.write(json.dumps({"seed": seed, **vars(result)}) + "\n")
    results = list(done.values())
    if arguments.markdown:
        print(table(results))
    if failed := [result for result in results if result.wrong]:
        print(f"{len(failed)} runs ended wrong; they are kept in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
