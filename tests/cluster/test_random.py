"""Nodes that fail while a chain runs: whenever it happens, the chain ends where a process left alone ends.

Why: a node fails at any instant, also between two jobs, in a job's start and in its last save. A few minutes for each
seed; HIVE_SCALE_CHAINS says how many.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chains import STAGES, Chain, call, same_end
from conftest import SCRIPT

from hive_scale.config import Config

SEEDS = int(os.environ.get("HIVE_SCALE_CHAINS", "3"))
BETWEEN = 40.0  # seconds between two failures, at most


def node_down(slurm: Path, node: str) -> None:
    """As an administrator, or a failed health check, takes it out; for some seconds."""
    call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    time.sleep(5)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)


def daemon_lost(slurm: Path, node: str) -> None:
    """With all that it has started; a node that has crashed and boots again."""
    pid = int((slurm / "run" / f"slurmd.{node}.pid").read_text())
    for one in (*descendants(pid), pid):
        subprocess.run(["kill", f"-{signal.SIGKILL:d}", str(one)], check=False)
    time.sleep(1)
    with (slurm / "start.txt").open("w") as out:
        subprocess.run(["bash", SCRIPT, "start", slurm], stdout=out, stderr=out, check=True)


def requeued(slurm: Path, node: str) -> None:
    for job in call("squeue", "-h", "-t", "R", "-o", "%i").split():
        subprocess.run(["scontrol", "requeue", job], check=False)


FAILURES: dict[str, Callable[[Path, str], None]] = {one.__name__: one for one in (node_down, daemon_lost, requeued)}


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(one for child in children for one in descendants(child))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_chain_under_node_failures(seed: int, slurm: Path, tmp_path: Path, pairs: Path, reference: Config) -> None:
    draw = random.Random(seed)
    chain = Chain(tmp_path, pairs, "slurm.attempts=10")
    chain.submit()
    for _ in range(draw.randint(1, 3)):
        time.sleep(draw.uniform(0, BETWEEN))
        failure = draw.choice([*FAILURES])
        print(seed, failure, [chain.state(stage) for stage in STAGES], flush=True)
        FAILURES[failure](slurm, draw.choice(("n1", "n2")))
    chain.until_done()
    same_end(chain.config, reference)
