"""Slurm resources of each stage: a site's profile, overridden by `slurm.*` words, then by words for one stage."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from hive_scale.config import DataConfig
from hive_scale.config_merge import resolve
from hive_scale.exit_codes import TRY_AGAIN
from hive_scale.presets import read_file

PROFILES = Path(__file__).parent / "profiles"
PREFIX = "slurm."
WORDS = ("partition", "gpu", "mem", "account", "qos", "interface")
WORD = re.compile(r"[\w.,:@%+/=^-]*")  # characters in names of partitions, accounts and the like
CONSTRAINT = re.compile(r"[\w.,:@%+/=^&|()\[\]*!-]*")  # the same with Slurm's operators


@dataclass(frozen=True)
class Resources:
    """Resources of one job. Empty text leaves a value to the cluster's default."""

    partition: str = ""
    nodes: int = 1
    gpus_per_node: int = 1
    gpu: str = ""  # model as launchers/plan.py names it; if given, submission reports planned memory and time
    tasks_per_node: int = 0  # processes per node; 0: one per GPU, or one without GPUs
    cpus_per_task: int = 8  # CPUs for one process and its data workers
    mem: str = ""  # memory per node in sbatch's format, such as 200G
    hours: float = 24.0  # time limit of one slice; a longer stage saves, requeues and resumes
    grace: int = 120  # seconds of warning before the end of a slice: a step and a save must fit
    attempts: int = 5  # consecutive starts from the same step after which a job gives up
    exclude_failed: bool = False  # on requeue, avoid nodes on which a task was killed or aborted, or lost its device
    account: str = ""
    qos: str = ""
    constraint: str = ""
    interface: str = ""  # network interface of NCCL and gloo, such as ib0
    # both are shell code that runs as is in every job: use only profiles from people whose scripts you would run
    python: str = ""  # command that runs Python in a job, such as "apptainer exec --nv hive.sif python"
    setup: list[str] = field(default_factory=list)  # shell lines before Python, such as "module load cuda"

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 0), ("cpus_per_task", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"slurm.{name}={getattr(self, name)} must be at least {least}")
        if 0 < self.gpus_per_node < self.tasks_per_node:
            raise ValueError(
                f"slurm.tasks_per_node={self.tasks_per_node} processes cannot share slurm.gpus_per_node="
                f"{self.gpus_per_node} GPUs: leave tasks_per_node out for one per GPU, or set gpus_per_node=0 for CPUs"
            )
        if not isfinite(self.hours):
            raise ValueError(f"slurm.hours={self.hours} is no length of time: set the hours of one slice")
        for name, allowed in (*dict.fromkeys(WORDS, WORD).items(), ("constraint", CONSTRAINT)):
            if not allowed.fullmatch(value := getattr(self, name)):
                raise ValueError(f"slurm.{name}={value} goes into the job's script and is no single word: correct it")
        if not 0 < self.grace < self.minutes * 60:
            raise ValueError(
                f"slurm.grace={self.grace} seconds do not fit into slurm.hours={self.hours:g}: change one of them"
            )

    @property
    def minutes(self) -> int:
        """Time limit of the job in minutes, rounded up."""
        return ceil(self.hours * 60)

    @property
    def tasks(self) -> int:
        """Number of processes on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Number of processes of a job."""
        return self.nodes * self.tasks


def read(profile: str | None, words: Sequence[str], bases: Mapping[str, Resources]) -> dict[str, Resources]:
    """Return `bases` by stage, overridden by `profile` (a name in slurm/profiles, or a YAML file), then ``slurm.*``
    words.

    A profile's `stages`, and words such as ``slurm.stages.joint.nodes=4``, apply to one stage. Raises ValueError with
    the remedy for an unknown key or stage.
    """
    common = read_file(_find(profile)) if profile else {}
    special: dict[str, list[Any]] = {name: [changes] for name, changes in common.pop("stages", {}).items()}
    plain: list[str] = []
    for word in (word.removeprefix(PREFIX) for word in words):
        if word.startswith("stages."):
            name, _, rest = word.removeprefix("stages.").partition(".")
            special.setdefault(name, []).append([rest])
        else:
            plain.append(word)
    for name in special.keys() - bases.keys():
        near = get_close_matches(name, bases, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(bases)}"
        raise ValueError(f"slurm.stages.{name}: there is no stage '{name}': {hint}")
    return {name: resolve(base, common, plain, *special.get(name, [])) for name, base in bases.items()}


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into those of the run and ``slurm.*`` words."""
    return [w for w in words if not w.startswith(PREFIX)], [w for w in words if w.startswith(PREFIX)]


def sbatch(resources: Resources, name: str, code: Path, data: DataConfig, after: str, notes: Path) -> dict[str, Any]:
    """Return submitit's parameters for a job called `name` that runs `code` once job `after` (if any) has succeeded.

    Jobs record their attempts and lost nodes in the directory `notes`.
    """
    given = {
        key: getattr(resources, key)
        for key in ("partition", "mem", "account", "qos", "constraint", "gpus_per_node")
        if getattr(resources, key)
    }
    more: dict[str, Any] = {"requeue": True}
    if after:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return given | {
        "job_name": name,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "cpus_per_task": resources.cpus_per_task,
        "time": resources.minutes,
        "signal_delay_s": resources.grace,
        "stderr_to_stdout": True,
        "setup": [f"export {key}={shlex.quote(value)}" for key, value in environment(resources, code, data).items()]
        + resources.setup,
        "teardown": requeue(resources, notes),
        "additional_parameters": more,
        # when one process ends, the others get a minute to end by themselves; since 22.05 srun does not inherit the
        # job's CPUs per task; block distribution gives a node consecutive ranks, whatever the cluster's default, so
        # that a sharding group stays inside a node
        "srun_args": [
            *("--kill-on-bad-exit=0", "--wait=60", "--distribution=block"),
            f"--cpus-per-task={resources.cpus_per_task}",
        ],
    }


# End of a job's script: requeue the job if that may help. It runs outside the container, which may lack Slurm's
# commands. srun reports the highest exit code, so a signal hides the other tasks' TRY_AGAIN: 128 plus the signal's
# number (killed: 137, aborted by NCCL: 134), or 253 if Slurm knows that memory ran out. A job that was cancelled, or
# that Slurm has already requeued, is no longer RUNNING. `ChainJob.begin` counts the attempts that get so far;
# consecutive starts that do not are counted here.
REQUEUE = r"""
status=$?
counted=$(sed -n 's/.*"job": "'$SLURM_JOB_ID'".*"restart": \([0-9]*\).*/\1/p' {notes}/attempts.jsonl | tail -n 1)
starts=$((${SLURM_RESTART_COUNT:-0} - ${counted:--1}))  # in a row before a first word; 0: this one has counted itself
if (( (status == {try_again} || status > 128 && status <= 192 || status == 253) && starts < {attempts} )) &&
  [ "$(squeue --noheader --format %T --jobs $SLURM_JOB_ID)" = RUNNING ]; then
  {lost}
  trap '' TERM  # which comes with the next line
  scontrol requeue $SLURM_JOB_ID  # back into the queue under the same id
  {exclude}
fi
exit $status
"""
# The nodes lost most recently, at most as many as the partition can spare. Slurm excludes nodes for a job that waits
# alone, so only after it is requeued; then all else is known, since the job may start, and this script be killed, soon.
LOST = """there=$(sinfo --noheader -N -p $SLURM_JOB_PARTITION -t idle,mix,alloc,comp -o %N | sort -u | wc -l)
  spare=$((there > SLURM_JOB_NUM_NODES ? there - SLURM_JOB_NUM_NODES : 0))
  lost=$(ls -t {notes}/lost/$SLURM_JOB_ID 2>/dev/null | head -n $spare | paste -sd,)"""
EXCLUDE = """[ -z "$lost" ] || scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$lost"""


def requeue(resources: Resources, notes: Path) -> list[str]:
    """Return the last lines of a job's script. Its attempts and lost nodes are recorded in `notes`."""
    words = {
        "{lost}": LOST if resources.exclude_failed else "",
        "{exclude}": EXCLUDE if resources.exclude_failed else "",
        "{notes}": shlex.quote(str(notes)),
        "{try_again}": str(TRY_AGAIN),
        "{attempts}": str(resources.attempts),
    }
    text = REQUEUE
    for name, word in words.items():
        text = text.replace(name, word)
    return [line for line in text.splitlines() if line.strip()]


def environment(resources: Resources, code: Path, data: DataConfig) -> dict[str, str]:
    """Return the environment variables of every process of a job, to be exported by its script."""
    threads = max(1, resources.cpus_per_task - data.workers)
    # the snapshot first; a user's own modules, such as extensions, may lie where his environment says
    paths = dict.fromkeys([str(code), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",  # otherwise the directory of submission would precede the snapshot
        "OMP_NUM_THREADS": str(threads),
    }
    if resources.interface:
        variables |= {"NCCL_SOCKET_IFNAME": resources.interface, "GLOO_SOCKET_IFNAME": resources.interface}
    return variables


def _find(profile: str) -> Path:
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES / f"{profile}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in PROFILES.glob("*.yaml"))
        raise ValueError(f"--profile {profile}: no such profile: give a YAML file, or one of {', '.join(known)}")
    return path
