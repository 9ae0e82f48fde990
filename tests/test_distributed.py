"""Every launcher's environment means the same world, and a rank that fails ends the job at once, told first."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hive_scale.distributed import _place, first_host, session

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_launchers_are_believed() -> None:
    place = _place(LAUNCHED)
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert not place.master


def test_a_launcher_inside_a_slurm_job_comes_first() -> None:
    assert _place(SRUN | LAUNCHED | {"RANK": "0"}).rank == 0


def test_srun_names_the_meeting_point() -> None:
    place = _place(SRUN)
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert place.master["MASTER_ADDR"] == "gpu007"
    assert place.master == _place(SRUN | {"SLURM_PROCID": "0"}).master
    assert place.master["MASTER_PORT"] != _place(SRUN | {"SLURM_STEP_ID": "1"}).master["MASTER_PORT"]
    assert _place(SRUN | {"MASTER_PORT": "29500"}).master["MASTER_PORT"] == "29500"


def test_a_batch_script_is_a_world_of_one() -> None:
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert _place(batch).size == 1


def test_submitit_on_one_machine() -> None:
    names = {"JOB_ID": "7", "NTASKS": "2", "GLOBALID": "1", "LOCALID": "1"}
    place = _place({f"SUBMITIT_LOCAL_{name}": value for name, value in names.items()})
    assert (place.rank, place.size, place.local_rank) == (1, 2, 1)


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set but not RANK, MASTER_ADDR, MASTER_PORT"):
        _place({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007-010,12],cpu1", "gpu007"), ("x1,x2", "x1"), ("a[3,5]-ib", "a3-ib")],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from hive_scale.distributed import session
with session() as world:
    if world.rank == 1:
        {fault}
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ('raise ValueError("lower stages.*.micro_batch")', "ValueError: lower stages.*.micro_batch"),
        ("os._exit(9)", "stops"),  # as the kernel ends it that has run out of memory
    ],
)
def test_a_failing_rank_ends_the_job(fault: str, shown: str, tmp_path: Path) -> None:
    """Started as srun would, with nobody to end the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1", "SLURM_STEP_ID": "0"}
    env |= {"SLURM_STEP_NUM_TASKS": "3", "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env.pop("WORLD_SIZE", None)
    began = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(fault=fault)],
            env=env | {"SLURM_PROCID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=90)[1] for process in started]
    assert all(process.returncode for process in started)
    assert time.monotonic() - began < 60  # most of it importing torch
    assert shown in "".join(errors)
    assert sum("Traceback" in error for error in errors) == 1


def test_a_port_in_use_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (LAUNCHED | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"cannot meet the others at .* set MASTER_PORT to a free one"), session():
            pass
