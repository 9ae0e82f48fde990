"""What Slurm knows of jobs. Its own commands are asked, since submitit trusts sacct alone, which may lag or lack."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}
NEVER = "DependencyNeverSatisfied"  # pending for ever


class SlurmError(RuntimeError):
    """Slurm refuses, or does not answer."""


class Job(NamedTuple):
    id: str
    state: str  # as Slurm calls it, such as PENDING; "" if it knows nothing of this job
    reason: str = ""  # of waiting, or where it runs

    @property
    def is_active(self) -> bool:
        """Whether it runs or may still run."""
        return bool(self.state) and self.state not in ENDED and self.reason != NEVER


def is_here(command: str = "squeue") -> bool:
    return shutil.which(command) is not None


def look_up(jobs: Mapping[str, str]) -> dict[str, Job]:
    """What became of `jobs`, given as {id: name}: from squeue, or once that has forgotten them from sacct.

    An id under another name is some other job: a cluster that was set up anew counts from one again. Raises
    SlurmError when the controller does not answer, for then nothing may be concluded.
    """
    if not jobs:
        return {}
    ids = ",".join(jobs)
    found = _parse(_squeue(ids), jobs)
    if lost := [job for job in jobs if job not in found]:
        # without accounting there is nothing to add
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,JobName,State,NodeList", "-j", ",".join(lost)]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        # what the controller no longer knows does not run, whatever accounting believes
        found |= {id: job for id, job in _parse(shown, jobs).items() if not job.is_active}
    return {id: found.get(id, Job(id, "")) for id in jobs}


def cancel(jobs: Sequence[str]) -> None:
    """Cancel one after the other, in this order: the last of a chain first, so that none begins meanwhile."""
    for job in jobs:
        subprocess.run(["scancel", job], check=False)


def _squeue(ids: str) -> str:
    command = ["squeue", "--noheader", "--states=all", f"--jobs={ids}", "--format=%i|%j|%T|%R"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:  # so it answers when it has forgotten a single job
        raise SlurmError(f"Slurm does not answer: {done.stderr.strip()}: try again when squeue works")
    return done.stdout


def _parse(shown: str, jobs: Mapping[str, str]) -> dict[str, Job]:
    found = {}
    for line in shown.splitlines():
        id, name, state, reason = line.split("|", 3)
        if jobs.get(id) == name:
            # "CANCELLED by 0"; "(Dependency)" or "n[1-2]"
            found[id] = Job(id, state.split()[0], reason.strip("()"))
    return found
