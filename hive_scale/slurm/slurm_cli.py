"""What Slurm knows of jobs. Its own commands are asked, since submitit trusts sacct alone, which may lag or lack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from hive_scale.exit_codes import TryAgain

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
NEVER = "DependencyNeverSatisfied"  # pending for ever


class SlurmError(ValueError):
    """Slurm refuses."""


class Silent(TryAgain, SlurmError):
    """Slurm does not answer."""


class Job(NamedTuple):
    """What Slurm says of a job."""

    id: str
    state: str  # as Slurm calls it, such as PENDING; "" if it knows nothing of this job
    reason: str = ""  # of waiting, or where it runs

    @property
    def is_active(self) -> bool:
        """Whether it runs or may still run."""
        return bool(self.state) and self.state not in ENDED and self.reason != NEVER


# Settings of the user's own, which a job, too, is to find Slurm by.
KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Without the variables of the job, or the step, that this process may itself be in.

    sbatch hands on the environment, and srun takes another job's limits, such as SLURM_MEM_PER_CPU, for options of its
    own; a process that is no task of srun's must not be taken for one.
    """
    theirs = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(theirs) and name not in KEPT}
    try:
        yield
    finally:
        os.environ.update(taken)


def is_here(command: str = "squeue") -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which(command) is not None


def look_up(jobs: Mapping[str, str]) -> dict[str, Job]:
    """What became of `jobs`, given as {id: name}: from squeue, or once that has forgotten them from sacct.

    An id under another name is some other job: a cluster that was set up anew counts from one again. Raises
    Silent when the controller does not answer, for then nothing may be concluded.
    """
    if not jobs:
        return {}
    ids = ",".join(jobs)
    found = _parse(_squeue(ids), jobs)
    if lost := [job for job in jobs if job not in found]:
        # without accounting there is nothing to add
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList,JobName", "-j", ",".join(lost)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        # what the controller no longer knows does not run, whatever accounting believes
        found |= {id: job for id, job in _parse(shown, jobs).items() if not job.is_active}
    return {id: found.get(id, Job(id, "")) for id in jobs}


def plain(name: str) -> str:
    """`name` as Slurm gives it back, whatever is in it: a job's name goes through a script's comment and tables."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel one after the other, in this order: the last of a chain first, so that none begins meanwhile."""
    for job in jobs:
        subprocess.run(["scancel", job], check=False)


def _squeue(ids: str) -> str:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={ids}", "--format=%i|%T|%R|%j"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:  # so it answers when it has forgotten a single job
        raise Silent(f"Slurm does not answer: {done.stderr.strip()}: try again when squeue works")
    return done.stdout


def _parse(shown: str, jobs: Mapping[str, str]) -> dict[str, Job]:
    found = {}
    for line in shown.splitlines():
        id, state, reason, name = [*line.split("|", 3), "", "", ""][:4]  # the name last: it may hold whatever it likes
        if id in jobs and plain(jobs[id]) == plain(name):
            # "CANCELLED by 0"; "(Dependency)" or "n[1-2]"
            found[id] = Job(id, state.split()[0], reason.strip("()"))
    return found
