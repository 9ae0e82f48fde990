"""Rank and world size from the environment variables of torchrun, srun, mpirun, submitit and other launchers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from zlib import crc32


@dataclass(frozen=True)
class Place:
    """Rank of this process among those of its start, and where they meet."""

    rank: int
    size: int
    local_rank: int
    master: Mapping[str, str]  # variables for torch's rendezvous to add to the environment
    by_slurm: bool = False  # True for a task of srun
    start: str = ""  # unique name of this start, known to all its ranks; if given, rank 0 may choose the port


# Variables for (rank, size, local rank, local size). First the MPI launchers: they may run under srun, whose variables
# their processes then have too, so these are looked at before Slurm's.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # mpiexec of MPICH and Intel
)
# Looked at after Slurm's, since srun itself may set these.
OTHERS = (
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
STARTS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "FLUX_JOB_ID", "PALS_APID")  # ids unique to one start
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")  # ids that several starts of one job share


def place_of(env: Mapping[str, str]) -> Place:
    """This process's place, from its launcher's variables. Raises ValueError if they are incomplete."""
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing and env["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but not {', '.join(missing)}: unset WORLD_SIZE, or start "
                "with torchrun, accelerate launch, deepspeed, srun or mpirun"
            )
        return Place(int(env.get("RANK", 0)), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), {})
    if (
        "SUBMITIT_LOCAL_GLOBALID" in env and env.get("SUBMITIT_EXECUTOR", "local") == "local"
    ):  # submitit's local executor; the node may itself come from srun, but this process is not srun's task
        size, job = int(env["SUBMITIT_LOCAL_NTASKS"]), env["SUBMITIT_LOCAL_JOB_ID"]
        rank, local_rank = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_LOCALID"])
        return _chosen(env, Place(rank, size, local_rank, {}), "127.0.0.1", int(job), f"submitit {job}")
    for names in MPI:
        if all(name in env for name in names[:3]):
            return _by_mpi(env, *names)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a task of srun; a batch script has no step id
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        # the port depends on job and step, since several may share a node
        job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
        found = Place(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), {}, by_slurm=True)
        start = f"slurm {job}.{step} {env.get('SLURM_RESTART_COUNT', '0')}"  # a requeued job keeps its id
        return _chosen(env, found, host, 37 * int(job) + int(step), start)
    for names in OTHERS:
        if all(name in env for name in names[:2]):
            return _by_mpi(env, *names)
    if "PMIX_RANK" in env:
        raise ValueError(
            f"PMIX_RANK={env['PMIX_RANK']} is set but nothing says how many processes there are: start with Open MPI's "
            "mpirun, srun or torchrun, or set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; unset it for one process"
        )
    return Place(0, 1, 0, {})


def _by_mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Place:
    """The place of a process whose launcher uses variables of these names. Raises ValueError without MASTER_ADDR."""
    found = Place(int(env[rank]), int(env[size]), int(env.get(local_rank, env[rank])), {})
    start = next((env[name] for name in STARTS if name in env), "")
    job = start or next((env[name] for name in JOBS if name in env), "")
    if env.get(local_size) == env[size] or env.get("FLUX_JOB_NNODES") == "1":
        host = "127.0.0.1"
    elif nodes := env.get("SLURM_JOB_NODELIST"):
        host = first_host(nodes)
    elif "MASTER_ADDR" in env or found.size == 1:
        host = ""
    else:
        raise ValueError(
            f"{size}={env[size]} is set but not MASTER_ADDR: hand on the name of rank 0's node, such as by "
            "mpirun -x MASTER_ADDR=NODE, or mpiexec -genv MASTER_ADDR NODE"
        )
    return _chosen(env, found, host, crc32(job.encode()), start)


def _chosen(env: Mapping[str, str], place: Place, host: str, number: int, start: str) -> Place:
    """Add the meeting point to `place`: the environment's, else `host` and a port computed from `number`.

    `start` names this start alone, so that no other start's store is taken for its own.
    """
    master = {"MASTER_ADDR": env.get("MASTER_ADDR", host), "MASTER_PORT": str(15000 + number % 15000)}
    if "MASTER_PORT" in env:
        return replace(place, master=master | {"MASTER_PORT": env["MASTER_PORT"]})
    return replace(place, master=master, start=start)


def first_host(nodelist: str) -> str:
    """The first host in Slurm's nodelist syntax: ``gpu007`` for ``gpu[007-010,12],cpu1``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else nodelist
