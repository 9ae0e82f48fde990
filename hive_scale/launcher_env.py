"""Where a launcher has put this process, as its environment says: torchrun's, srun's, mpirun's and others' words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from zlib import crc32


@dataclass(frozen=True)
class Place:
    """Of this process among those of its start."""

    rank: int
    size: int
    local_rank: int
    master: Mapping[str, str]  # environment variables that torch's rendezvous needs beyond the present ones
    by_slurm: bool = False  # a task of srun's
    start: str = ""  # tells this start from all others, where rank 0 may choose the port


# how launchers say rank, size, number on the node and processes there: those that may be started by Slurm's srun, whose
# words their processes then have, too, ...
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH's and Intel's mpiexec
)
# ... and those whose words srun may say
OTHERS = (
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
STARTS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "FLUX_JOB_ID", "PALS_APID")  # each tells a start from others
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")  # several starts may share one


def place_of(env: Mapping[str, str]) -> Place:
    """Where the launcher has put this process. Raises ValueError when its environment is half set."""
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
    ):  # on a node that srun may have given, whose task it is not
        size, job = int(env["SUBMITIT_LOCAL_NTASKS"]), env["SUBMITIT_LOCAL_JOB_ID"]
        rank, local_rank = int(env["SUBMITIT_LOCAL_GLOBALID"]), int(env["SUBMITIT_LOCAL_LOCALID"])
        return _chosen(env, Place(rank, size, local_rank, {}), "127.0.0.1", int(job), f"submitit {job}")
    for names in MPI:
        if all(name in env for name in names[:3]):
            return _by_mpi(env, *names)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a task of srun: a batch script has no step
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
        host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        # jobs and steps that share a node need ports of their own
        job, step = env.get("SLURM_JOB_ID", "0"), env["SLURM_STEP_ID"]
        found = Place(int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", 0)), {}, by_slurm=True)
        start = f"slurm {job}.{step} {env.get('SLURM_RESTART_COUNT', '0')}"  # a job that is queued again keeps its id
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
    """The place of a process whose launcher says its own in variables of these names."""
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
    """`place` with where to meet: what the environment says, else at `host`, at a port that `number` tells.

    `start` is what only this start's processes have in common; nobody else's store is taken for theirs.
    """
    master = {"MASTER_ADDR": env.get("MASTER_ADDR", host), "MASTER_PORT": str(15000 + number % 15000)}
    if "MASTER_PORT" in env:
        return replace(place, master=master | {"MASTER_PORT": env["MASTER_PORT"]})
    return replace(place, master=master, start=start)


def first_host(nodelist: str) -> str:
    """First host of Slurm's shorthand: ``gpu[007-010,12],cpu1`` begins with ``gpu007``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^\[,]*)", nodelist)
    return "".join(part or "" for part in match.groups()) if match else nodelist
