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


# how launchers say rank, size, number on the node and processes there: those that may be started by Slurm's srun, whose
# words their processes then have, too; ...
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH's and Intel's: srun says the first two
# ... and those whose words srun may say
OTHERS = (
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)
# variables by which a launcher is known, for people: what was started last comes first
LAUNCHERS = {
    "ACCELERATE_MIXED_PRECISION": "accelerate launch",
    "TORCHELASTIC_RUN_ID": "torchrun",
    "CROSS_SIZE": "the deepspeed launcher",
    "SUBMITIT_EXECUTOR": "submitit",
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpirun",
    "MPI_LOCALRANKID": "mpiexec",
    "SLURM_STEP_ID": "srun",
    "FLUX_TASK_RANK": "flux run",
    "PMI_SIZE": "mpiexec",
    "WORLD_SIZE": "hand, by WORLD_SIZE",
}
STARTS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "FLUX_JOB_ID", "PALS_APID")  # ids unique to one start
JOBS = ("SLURM_JOB_ID", "LSB_JOBID", "PBS_JOBID")  # ids that several starts of one job share


def place_of(env: Mapping[str, str]) -> Place:
    """Where the launcher has put this process. Raises ValueError if its environment is half set or contradicts itself.

    A variable that is empty counts as not set.
    """
    found = _place({name: value for name, value in env.items() if value})
    if not 0 <= found.rank < found.size:
        raise ValueError(
            f"rank {found.rank} of {found.size} processes cannot be: WORLD_SIZE, or what stands for it, counts those "
            "of all nodes, and ranks begin with 0: correct what the launcher's environment says"
        )
    port = found.master.get("MASTER_PORT") or env.get("MASTER_PORT", "")
    if found.size > 1 and not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(
            f"MASTER_PORT={port} is no port: set it to a free one between 1 and 65535 (Kubernetes, too, sets one of "
            "this name, for a Service that is called master)"
        )
    return found


def launcher_of(env: Mapping[str, str]) -> str:
    """The launcher that started this process, for people; "" if there was none."""
    return next((name for variable, name in LAUNCHERS.items() if env.get(variable)), "")


def check_all_started(env: Mapping[str, str]) -> None:
    """Raises ValueError for a Slurm batch script that asked for several tasks, and then started one process itself.

    A shell in an allocation (salloc) is left alone: nothing but a script has asked for this very command.
    """
    tasks = env.get("SLURM_NTASKS", "1")
    by_script = "SLURM_PROCID" in env and "SLURM_STEP_ID" not in env  # a task of srun has a step
    if by_script and tasks.isdecimal() and int(tasks) > 1 and not launcher_of(env):
        raise ValueError(
            f"the Slurm job has {tasks} tasks (SLURM_NTASKS), and its script starts one process: put srun before the "
            "command, or set WORLD_SIZE=1 for one process"
        )


def _place(env: Mapping[str, str]) -> Place:
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing and env["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but not {', '.join(missing)}: unset WORLD_SIZE, or start "
                "with torchrun, accelerate launch, deepspeed, srun or mpirun"
            )
        rank, size, local_rank = (_number(env, *one) for one in (("RANK", 0), ("WORLD_SIZE",), ("LOCAL_RANK", 0)))
        return Place(rank, size, local_rank, {})
    if (
        "SUBMITIT_LOCAL_GLOBALID" in env and env.get("SUBMITIT_EXECUTOR", "local") == "local"
    ):  # on a node that srun may have given, whose task it is not
        rank, size, local_rank, job = (
            _number(env, f"SUBMITIT_LOCAL_{name}") for name in ("GLOBALID", "NTASKS", "LOCALID", "JOB_ID")
        )
        return _chosen(env, Place(rank, size, local_rank, {}), "127.0.0.1", job, f"submitit {job}")
    for names, told in (*((names, names[:2]) for names in MPI), (HYDRA, HYDRA[:3])):
        if all(name in env for name in told):
            return _by_mpi(env, *names)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a task of srun: a batch script has no step
        size = _number(env, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS", 1)
        host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost")))
        # jobs and steps that share a node need ports of their own
        job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID")
        found = Place(_number(env, "SLURM_PROCID"), size, _number(env, "SLURM_LOCALID", 0), {}, by_slurm=True)
        start = f"slurm {job}.{step} {env.get('SLURM_RESTART_COUNT', '0')}"  # a job that is queued again keeps its id
        return _chosen(env, found, host, 37 * job + step, start)
    for names in OTHERS:
        if all(name in env for name in names[:2]):
            return _by_mpi(env, *names)
    _check_half_set(env)
    return Place(0, 1, 0, {})


def _check_half_set(env: Mapping[str, str]) -> None:
    """Raises ValueError for one of several processes, or one in place of several, that would take itself for all."""
    # accelerate starts one process where it sees no GPU, however many were asked for; it then sets just these
    if "ACCELERATE_USE_CPU" in env and "MASTER_ADDR" in env and "MASTER_PORT" in env:
        raise ValueError(
            "accelerate launch was asked for several processes and has started one, as it does where it finds no GPU: "
            "use accelerate launch --multi_gpu --num_processes N, which runs on CPUs, too, or torchrun "
            "--nproc_per_node N; for one process unset MASTER_ADDR and MASTER_PORT, and ask for one"
        )
    # the last three are said by torchrun to its processes, and by Kubernetes to torchrun
    ranks, sizes = {"RANK", "PMIX_RANK"}, {"LOCAL_WORLD_SIZE", "PET_NNODES", "PET_NPROC_PER_NODE"}
    for rank, size, *_ in (*MPI, HYDRA, *OTHERS):
        ranks.add(rank)
        sizes.add(size)
    remedy = (
        "start with Open MPI's mpirun, srun or torchrun, or set WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT; unset "
        "it for one process"
    )
    if found := sorted(ranks & env.keys()):
        raise ValueError(f"{found[0]}={env[found[0]]} is set but nothing says how many processes there are: {remedy}")
    if found := sorted(name for name in sizes & env.keys() if env[name] != "1"):
        raise ValueError(f"{found[0]}={env[found[0]]} is set but nothing says which of them this process is: {remedy}")


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """What the variable `name` says. Raises ValueError if that is no number, or it is not set and has no default."""
    try:
        return int(env[name] if default is None else env.get(name, default))
    except KeyError:
        told = f"{name} is not set, though others of its launcher are"
    except ValueError:
        told = f"{name}={env[name]} is no number"
    raise ValueError(f"{told}: correct what the launcher's environment says")


def _by_mpi(env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Place:
    """The place of a process whose launcher says its own in variables of these names."""
    number = _number(env, rank)
    found = Place(number, _number(env, size), _number(env, local_rank, number), {})
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
