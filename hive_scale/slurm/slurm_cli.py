"""Query and cancel Slurm jobs with Slurm's own commands; submitit relies on sacct alone, which may lag."""

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
NEVER = "DependencyNeverSatisfied"  # reason of a job that stays pending forever


class SlurmError(ValueError):
    """Slurm refuses a request."""


class Silent(TryAgain, SlurmError):
    """Slurm does not answer."""


class Job(NamedTuple):
    """State of a job as Slurm reports it."""

    id: str
    state: str  # in Slurm's terms, such as PENDING; "" if Slurm does not know the job
    reason: str = ""  # reason for waiting, or the nodes on which it runs

    @property
    def is_active(self) -> bool:
        """True if it runs or may still run."""
        return bool(self.state) and self.state not in ENDED and self.reason != NEVER


# The user's own settings for reaching Slurm, which jobs need as well.
KEPT = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"}


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Within, hide the environment variables of the Slurm job or step that this process may run in.

    sbatch passes the environment on, and srun would read another job's limits, such as SLURM_MEM_PER_CPU, as options.
    A process that srun did not start must not look like one of its tasks.
    """
    theirs = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(theirs) and name not in KEPT}
    try:
        yield
    finally:
        os.environ.update(taken)


def is_here(command: str = "squeue") -> bool:
    """True if this machine has Slurm's commands."""
    return shutil.which(command) is not None


def look_up(jobs: Mapping[str, str]) -> dict[str, Job]:
    """Return the states of `jobs`, given as {id: name}, from squeue, or from sacct once squeue has forgotten them.

    An id with another name is a different job, since a reinstalled cluster counts from one again. Raises Silent if the
    controller does not answer, because nothing can be concluded then.
    """
    if not jobs:
        return {}
    ids = ",".join(jobs)
    found = _parse(squeue(ids), jobs)
    if lost := [job for job in jobs if job not in found]:
        # sacct prints nothing without accounting
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State,NodeList,JobName", "-j", ",".join(lost)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        # a job that the controller has forgotten is not running, whatever accounting says
        found |= {id: job for id, job in _parse(shown, jobs).items() if not job.is_active}
    return {id: found.get(id, Job(id, "")) for id in jobs}


def plain(name: str) -> str:
    """Return `name` with only characters that survive a script's comment and Slurm's tables."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs in the given order. Give the last of a chain first, so that none starts meanwhile."""
    for job in jobs:
        subprocess.run(["scancel", job], check=False)


def squeue(ids: str) -> str:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={ids}", "--format=%i|%T|%R|%j"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:  # it fails so if the only job is forgotten
        raise Silent(f"Slurm does not answer: {done.stderr.strip()}: try again when squeue works")
    return done.stdout


def _parse(shown: str, jobs: Mapping[str, str]) -> dict[str, Job]:
    found = {}
    for line in shown.splitlines():
        id, state, reason, name = [*line.split("|", 3), "", "", ""][:4]  # the name may hold a "|"
        if id in jobs and plain(jobs[id]) == plain(name):
            # state: "CANCELLED by 0"; reason: "(Dependency)" or "n[1-2]"
            found[id] = Job(id, state.split()[0], reason.strip("()"))
    return found
