"""Every launcher's environment gives the same world, and a failing rank ends the job at once, reported first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hive_scale.distributed import session
from hive_scale.exit_codes import TRY_AGAIN
from hive_scale.launcher_env import check_all_started, first_host, launcher_of, place_of

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}
# as accelerate launch --num_processes 2 sets it where it finds no GPU
ACCELERATE_ON_CPU = {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_launchers_are_believed() -> None:
    place = place_of(LAUNCHED)
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert not place.master


def test_a_launcher_inside_a_slurm_job_comes_first() -> None:
    assert place_of(SRUN | LAUNCHED | {"RANK": "0"}).rank == 0


def test_srun_names_the_meeting_point() -> None:
    place = place_of(SRUN)
    assert (place.rank, place.size, place.local_rank) == (3, 4, 1)
    assert place.master["MASTER_ADDR"] == "gpu007"
    assert place.master == place_of(SRUN | {"SLURM_PROCID": "0"}).master
    assert place.master["MASTER_PORT"] != place_of(SRUN | {"SLURM_STEP_ID": "1"}).master["MASTER_PORT"]
    assert place_of(SRUN | {"MASTER_PORT": "29500"}).master["MASTER_PORT"] == "29500"


def test_a_batch_script_is_a_world_of_one() -> None:
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert place_of(batch).size == 1


def test_submitit_on_one_machine() -> None:
    names = {"JOB_ID": "7", "NTASKS": "2", "GLOBALID": "1", "LOCALID": "1"}
    place = place_of({f"SUBMITIT_LOCAL_{name}": value for name, value in names.items()})
    assert (place.rank, place.size, place.local_rank) == (1, 2, 1)


def test_a_local_chain_on_a_node_of_srun_s_is_a_world_of_its_own() -> None:
    names = {"LOCAL_JOB_ID": "7", "LOCAL_NTASKS": "2", "LOCAL_GLOBALID": "1", "LOCAL_LOCALID": "1", "EXECUTOR": "local"}
    session = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    place = place_of(session | {f"SUBMITIT_{name}": value for name, value in names.items()})
    assert (place.rank, place.size, place.local_rank) == (1, 2, 1)
    assert place.master["MASTER_ADDR"] == "127.0.0.1"
    # a job of Slurm's that submitit has submitted is srun's, though submitted from such a chain
    names["EXECUTOR"] = "slurm"
    assert place_of(SRUN | {f"SUBMITIT_{name}": value for name, value in names.items()}).size == 4


def alone_in_a_session_of_two(rank: int, patience: float) -> subprocess.CompletedProcess[str]:
    """A process that srun has started with another, which never joins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = f"""
from datetime import timedelta
from hive_scale import distributed, rendezvous
rendezvous.JOINING, rendezvous.SAYING = timedelta(seconds={patience}), 1.0
try:
    with distributed.session():
        print("met")
except ValueError as error:
    print(error)
"""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    env |= SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_STEP_NODELIST": "localhost"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1]), "MASTER_PORT": str(port)}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_never_joins_is_named_while_one_waits_and_at_the_end(rank: int) -> None:
    shown = alone_in_a_session_of_two(rank, patience=3)
    assert f"rank {rank} of 2 waits at localhost:" in shown.stderr
    assert f" for rank {1 - rank}, " in shown.stderr
    assert "Traceback" not in shown.stderr
    assert shown.stdout.startswith(f"rank {rank} of 2 cannot meet rank {1 - rank} at localhost:")
    assert "start all 2 by one command" in shown.stdout


RESTARTING = """
import os, signal, sys, time
from pathlib import Path
from hive_scale.distributed import session
from hive_scale.resilience.watchdog import Watchdog
faults = {faults}
def met():
    return len([*Path(__file__).parent.glob("met_*")])
def meet(place, number):
    rank, where, how = faults[number] if number < len(faults) else (None, None, None)
    if (rank, where) == (int(os.environ["RANK"]), place):
        Path(__file__).with_name(f"met_{{number}}").touch()
        if how == "raises":
            raise RuntimeError("once")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
meet("at start", met())
with session() as world:
    number = met()
    world.barrier()
    with Watchdog(world, 3):
        world.timer.enter("forward")
        meet("in a step", number)
        world.barrier()
    print("rank", world.rank, "finished", flush=True)
"""


def agents_of_two_nodes(folder: Path, faults: list[tuple[int, str, str]], *rendezvous: str) -> list[list[str]]:
    """What each of two agents' workers print in the end; one rank after the other meets a fault before."""
    (folder / "worker.py").write_text(RESTARTING.format(faults=faults))
    line = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--max_restarts={len(faults)}"]
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", *line, *rendezvous, f"--node_rank={node}", str(folder / "worker.py")],
            env=env | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        said = [agent.communicate(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert len([*folder.glob("met_*")]) == len(faults)
    return [out.splitlines() for out, _ in said]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow  # the other rendezvous is tried every time
def test_two_agents_with_a_static_rendezvous_recover(tmp_path: Path) -> None:
    """Their store, which outlives each attempt, still holds why the ones before failed."""
    faults = [(1, "at start", "is killed"), (0, "in a step", "is killed"), (1, "in a step", "raises")]
    faults += [(1, "in a step", "stands still"), (0, "at start", "raises")]
    meeting = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    assert agents_of_two_nodes(tmp_path, faults, *meeting) == [["rank 0 finished"], ["rank 1 finished"]]


def test_two_agents_that_find_each_other_recover(tmp_path: Path) -> None:
    faults = [(1, "in a step", "is killed"), (0, "in a step", "stands still"), (1, "at start", "raises")]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=two"]
    said = agents_of_two_nodes(tmp_path, faults, *meeting, "--local_addr=127.0.0.1")
    assert sorted(line for lines in said for line in lines) == ["rank 0 finished", "rank 1 finished"]


HOLDING = """
import ctypes, os, signal, time
from hive_scale.distributed import session
with session() as world:
    world.barrier()
    if world.rank == {killed}:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.PyDLL(None).sleep(1000)  # in C, with Python's lock
"""


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_in_a_c_call_ends_when_another_is_killed(tmp_path: Path, killed: int) -> None:
    began = time.monotonic()
    codes, said = started_by_srun(HOLDING.format(killed=killed), 2)
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    assert f"rank {1 - killed} does not end by itself" in said[1 - killed]


ALONE_IN_C = """
import ctypes, os, time
from hive_scale import heartbeat
from hive_scale.distributed import session
heartbeat.SILENT = 3.0
with session() as world:
    world.barrier()
    if world.rank == 1:
        {busy}
    world.barrier()
"""


def test_a_long_c_call_and_a_suspended_process_are_no_loss() -> None:
    """A companion speaks for a rank whose Python stands; also for one that is stopped, which others may wait for."""
    stop = "os.system(f'(sleep 8; kill -CONT {os.getpid()}) & kill -STOP {os.getpid()}')"
    codes, said = started_by_srun(ALONE_IN_C.format(busy=f"ctypes.PyDLL(None).sleep(8); {stop}"), 2)
    assert codes == [0, 0], said


@pytest.mark.parametrize("silent", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_is_gone_is_missed(silent: int) -> None:
    """It says nothing any more, and its connections stand: as where its power, or the network, is cut."""
    cut = "os.system(f'pkill -STOP -P {os.getpid()} python; kill -STOP {os.getpid()}')"
    script = ALONE_IN_C.replace("world.rank == 1", f"world.rank == {silent}").format(busy=cut)
    codes, said = started_by_srun(script, 2, waits_for=1 - silent)
    assert codes[1 - silent] == TRY_AGAIN, said
    assert "nothing heard for 3 s" in said[1 - silent] or "has been silent for 3 s" in said[1 - silent]


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set but not RANK, MASTER_ADDR, MASTER_PORT"):
        place_of({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("env", "told"),
    [
        # one of several processes that would take itself for the only one, and train beside the others
        ({"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=1 is set but nothing says how many"),
        ({"PMI_RANK": "1"}, "PMI_RANK=1 is set but nothing says how many"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 is set but nothing says which of them"),
        ({"FLUX_JOB_SIZE": "4", "FLUX_JOB_ID": "f"}, "FLUX_JOB_SIZE=4 is set but nothing says which of them"),
        # words that contradict each other: it would wait in vain for others
        (LAUNCHED | {"RANK": "4"}, "rank 4 of 4 processes cannot be: WORLD_SIZE"),
        (LAUNCHED | {"WORLD_SIZE": "1"}, "rank 3 of 1 processes cannot be"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, "rank 3 of 2 processes cannot be"),
        # words that are none
        (LAUNCHED | {"MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT=tcp://10.0.0.1:29500 is no port"),
        (SRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        (LAUNCHED | {"MASTER_ADDR": ""}, "WORLD_SIZE=4 is set but not MASTER_ADDR"),
        (LAUNCHED | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
        ({"SUBMITIT_LOCAL_GLOBALID": "0"}, "SUBMITIT_LOCAL_NTASKS is not set, though others"),
        # one process where several were asked for
        (ACCELERATE_ON_CPU, "was asked for several processes and has started one"),
        ({"LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE=2 is set but nothing says which of them"),
        ({"PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8 is set but nothing says which of them"),
    ],
)
def test_words_that_say_too_little_or_contradict_each_other_are_refused(env: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        place_of(env)


def test_accelerate_with_one_process_or_with_mpirun_is_believed() -> None:
    assert place_of({"ACCELERATE_USE_CPU": "True"}).size == 1
    assert place_of(ACCELERATE_ON_CPU | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}).size == 2


def test_a_batch_script_that_forgot_srun_is_refused_before_it_trains() -> None:
    batch = {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    with pytest.raises(ValueError, match=r"8 tasks .* put srun before the command"):
        check_all_started(batch)
    shell = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "8"}  # of salloc
    torchrun = batch | LAUNCHED
    for env in (SRUN, shell, torchrun, batch | {"SLURM_NTASKS": "1"}, batch | {"WORLD_SIZE": "1"}, {}):
        check_all_started(env)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, ""),
        (SRUN, "srun"),
        (SRUN | LAUNCHED | {"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        (SRUN | {"SUBMITIT_EXECUTOR": "slurm"}, "submitit"),
        (LAUNCHED | {"CROSS_SIZE": "1"}, "the deepspeed launcher"),
        (LAUNCHED, "hand, by WORLD_SIZE"),
    ],
)
def test_the_launcher_has_a_name_for_people(env: dict[str, str], name: str) -> None:
    assert launcher_of(env) == name


def test_a_launcher_that_does_not_say_the_number_on_the_node_is_believed() -> None:
    place = place_of({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "h1"})
    assert (place.rank, place.size) == (1, 2)
    assert place_of({"WORLD_SIZE": "", "RANK": "", "PMI_SIZE": "1"}).size == 1  # empty is not set; one is alone


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[007-010,12],cpu1", "gpu007"), ("x1,x2", "x1"), ("a[3,5]-ib", "a3-ib")],
)
def test_first_host(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def started_by_srun(script: str, size: int, waits_for: int | None = None) -> tuple[list[int | None], list[str]]:
    """How ranks end that srun would have started, with nobody to end the others, and what they say on stderr.

    Those besides `waits_for` are killed in the end.
    """
    env = os.environ | {"MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1", "SLURM_STEP_ID": "0"}
    env |= {"SLURM_STEP_NUM_TASKS": str(size), "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env.pop("WORLD_SIZE", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=env | {"SLURM_PROCID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]
    try:
        if waits_for is not None:
            started[waits_for].wait(90)
            for process in started:
                os.killpg(process.pid, signal.SIGKILL)
        said = [process.communicate(timeout=90)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


SCRIPT = """
import os, sys, torch, torch.distributed as dist
from hive_scale.distributed import session
with session() as world:
    if world.rank == 1:
        {fault}
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("fault", "shown", "tracebacks"),
    [
        ('raise ValueError("lower stages.*.micro_batch")', "ValueError: lower stages.*.micro_batch", {1}),
        # as the kernel ends it that has run out of memory: a collective may find out before this rank is told
        ("os._exit(9)", "stops", {0, 1}),
    ],
)
def test_a_failing_rank_ends_the_job(fault: str, shown: str, tracebacks: set[int], tmp_path: Path) -> None:
    """Started as srun would, with nobody to end the others."""
    began = time.monotonic()
    codes, errors = started_by_srun(SCRIPT.format(fault=fault), 3)
    assert all(codes)
    assert time.monotonic() - began < 60  # most of it importing torch
    assert shown in "".join(errors)
    assert sum("Traceback" in error for error in errors) in tracebacks


def test_a_port_in_use_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (LAUNCHED | {"RANK": "0", "MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
        with (
            pytest.raises(ValueError, match=r"cannot meet ranks 1, 2, 3 at .* set MASTER_PORT to a free one"),
            session(),
        ):
            pass
