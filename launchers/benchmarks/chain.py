"""Time between the stages of a chain on Slurm, beside a chain of jobs that do nothing: Slurm's own share.

Needs a Slurm of two nodes in reach; ``tests/cluster/cluster.sh start DIR`` makes one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.table import describe_machine, show, spread
from benchmarks.workers import LAUNCHER

HELP = "seconds between chained stages on Slurm, beside a chain of empty jobs"
SUBMIT = LAUNCHER.parents[1] / "slurm" / "submit_pipeline.py"
STEPS = 3


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=2, help="of each job (2)")
    parser.add_argument("--folder", type=Path, help="for the runs, seen by all nodes (default: a temporary one here)")


def run(arguments: argparse.Namespace) -> None:
    if not shutil.which("sbatch"):
        raise ValueError(f"no Slurm in reach: {__doc__.splitlines()[2]}")
    from hive_scale.observability.metrics import read_metrics

    found: dict[str, list[float]] = {}
    with TemporaryDirectory(dir=arguments.folder) as folder:
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds} ...", file=sys.stderr, flush=True)
            add(found, "empty job: end to next start", gaps(empty_chain(arguments.nodes)))
            place = Path(folder, str(number))
            jobs = stages(place, arguments.nodes)
            add(found, "stage: end to next start", gaps(list(jobs.values())))
            for stage, job in jobs.items():
                began, ended = times(job)
                first, *_, last = read_metrics(place / stage / "metrics.jsonl")
                add(found, "stage: start of the job to the first step", [first["time"] - first["seconds"] - began])
                add(found, "stage: last step to the end of the job", [ended - last["time"]])
    rows = [[what, str(len(values)), f"{median(values):.1f}", spread(values)] for what, values in found.items()]
    caption = f"{describe_machine()}; {arguments.nodes} nodes; Slurm tells whole seconds"
    show(("from to", "times", "seconds", "quartiles"), rows, caption, arguments.markdown)


def add(found: dict[str, list[float]], what: str, values: Sequence[float]) -> None:
    found.setdefault(what, []).extend(values)


def empty_chain(nodes: int) -> list[str]:
    jobs: list[str] = []
    for _ in range(3):
        after = [f"--dependency=afterok:{jobs[-1]}"] if jobs else []
        words = ["sbatch", "--parsable", f"-N{nodes}", "-o/dev/null", *after, "--wrap", "srun true"]
        jobs.append(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip())
    return jobs


def stages(output: Path, nodes: int) -> dict[str, str]:
    """Submit the debug preset's three stages, a few steps each; return their jobs."""
    words = ["--preset", "debug", f"output={output}", "blank_image_control=false", "eval_interval=0"]
    words += [f"stages.{stage}.max_steps={STEPS}" for stage in ("projector", "language", "joint")]
    words += [f"slurm.nodes={nodes}", "slurm.cpus_per_task=1", "slurm.mem=2G"]
    done = subprocess.run([sys.executable, str(SUBMIT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)
    jobs: dict[str, str] = json.loads((output / "slurm" / "chain.json").read_text())["jobs"]
    return jobs


def gaps(jobs: Sequence[str]) -> list[float]:
    """Seconds from the end of each job to the start of the next, once all have ended."""
    spans = [times(job) for job in jobs]
    return [after[0] - before[1] for before, after in pairwise(spans)]


def times(job: str) -> tuple[float, float]:
    """Start and end of a job in seconds since 1970, once it has ended. Raises ValueError if it failed."""
    command = ["sacct", "-X", "-n", "-P", "-o", "State,Start,End", "-j", job]
    while True:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        state, start, end = shown.split("|") if shown else ("PENDING", "", "")
        if state == "COMPLETED" and end != "Unknown":
            return datetime.fromisoformat(start).timestamp(), datetime.fromisoformat(end).timestamp()
        if state not in ("PENDING", "RUNNING", "COMPLETING", "COMPLETED", "REQUEUED"):
            raise ValueError(f"job {job} ended as {state}: see its log")
        time.sleep(0.5)
