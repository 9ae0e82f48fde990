"""A run's stages and downstream jobs as a chain of Slurm jobs: decide what to submit, record what was submitted."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hive_scale import config as configs
from hive_scale import config_merge, credentials, strict_json
from hive_scale.atomic import write_text
from hive_scale.config import Config
from hive_scale.shared_files import locked
from hive_scale.slurm import slurm_cli
from hive_scale.slurm.downstream import LAUNCHERS, DownstreamJob, Followers
from hive_scale.slurm.resources import Resources
from hive_scale.slurm.slurm_cli import Job
from hive_scale.strict_json import dumps
from hive_scale.version import code_version

Verb = Literal["done", "kept", "submit"]


class Link(NamedTuple):
    """Decision about a stage or downstream job: done, kept, or to be submitted."""

    stage: str
    verb: Verb
    after: str = ""  # the stage whose job it waits for; "": none
    replaces: str = ""  # id of a pending job to cancel, because its predecessor is resubmitted


def decide(order: Mapping[str, str], done: Collection[str], jobs: Mapping[str, Job]) -> list[Link]:
    """Skip finished stages, keep jobs that run or wait for the right predecessor, submit the rest behind them.

    `order` maps every stage, first to last, to the one it waits for. `done` are stages whose weights exist; only that
    counts, not how a job ended. `jobs` are the last submitted jobs by stage, in their present state.
    """
    links: list[Link] = []
    fresh: set[str] = set()
    for stage, after in order.items():
        job = jobs.get(stage)
        if stage in done:
            links.append(Link(stage, "done"))
            continue
        while after in done:
            after = order[after]
        if job and job.is_active and not (after in fresh and job.state == "PENDING"):
            links.append(Link(stage, "kept", after))
        else:
            waits_in_vain = job is not None and job.state == "PENDING"
            links.append(Link(stage, "submit", after, job.id if job and waits_in_vain else ""))
            fresh.add(stage)
    return links


@dataclass
class Record:
    """Record of what was submitted, stored in ``<run>/slurm/chain.json``."""

    cwd: str = ""  # directory that relative paths of the config refer to
    run: str = ""  # the run's directory at submission
    code: dict[str, str] = field(default_factory=dict)  # {package: version}, ours with its commit
    cluster: str = ""
    jobs: dict[str, str] = field(default_factory=dict)  # stage -> id of its last job
    steps: dict[str, int] = field(default_factory=dict)  # stage -> optimizer steps
    resources: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> fields of its Resources
    then: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> fields of a DownstreamJob

    def followers(self) -> dict[str, DownstreamJob]:
        for name, fields in self.then.items():
            config_merge.refuse_references(fields.get("words"), Path(f"after.{name}"))  # a job would resolve them
        return {name: DownstreamJob(**fields) for name, fields in self.then.items()}

    @staticmethod
    def path(run_dir: Path) -> Path:
        """Path of the chain's record in a run directory."""
        return run_dir / "slurm" / "chain.json"

    @classmethod
    def read(cls, run_dir: Path) -> Record | None:
        """Read the record of a run; None if there is none. Raises ValueError if it is damaged or invalid."""
        path = cls.path(run_dir)
        if not path.exists():
            return None
        try:
            record = cls(**strict_json.read(path))
            record._check()
        except (OSError, ValueError, TypeError, AttributeError) as error:
            remedy = "restore it, or cancel the run's jobs and delete it"
            raise ValueError(f"{path} is not what was written ({error}): {remedy}") from None
        if record.run and not _is_same(Path(record.run), run_dir):
            record.jobs = {}  # the run was copied or moved: its jobs belong to the old path
        return record

    def _check(self) -> None:
        """Raise ValueError, TypeError or AttributeError for content that cannot be passed to Slurm."""
        for job in self.jobs.values():
            if not re.fullmatch(r"\w+", job):  # ids become parts of commands and file names
                raise ValueError(f"{job!r} is no job's id")
        if not all(isinstance(count, int) for count in self.steps.values()):
            raise ValueError("steps that are no numbers")
        for follower in self.followers().values():
            words = follower.words
            if (
                follower.launcher not in LAUNCHERS.values()
                or not words
                or not all(isinstance(word, str) for word in words)
            ):
                raise ValueError(f"{follower.launcher} with {words} is no launcher that follows a run")
        for asked in self.resources.values():
            Resources(**asked)

    def write(self, run_dir: Path) -> None:
        write_text(self.path(run_dir), dumps(asdict(self), indent=1))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def recorded(
    config: Config, asked: Mapping[str, Resources], cluster: str, steps: Mapping[str, int], then: Followers
) -> Record:
    """Update and write the run's record, with its config beside it, and return the record."""
    record = Record.read(config.run_dir) or Record()
    record.cwd, record.code, record.cluster, record.steps = os.getcwd(), code_version(), cluster, dict(steps)
    record.run = str(config.run_dir.resolve())
    record.resources = {stage: asdict(resources) for stage, resources in asked.items()}
    record.then = {name: asdict(follower) for name, follower in then.items()}
    configs.save(config, Record.path(config.run_dir).with_name("config.yaml"))
    record.write(config.run_dir)
    credentials.keep(config.run_dir)
    return record


@contextmanager
def submitting(run_dir: Path) -> Iterator[Path]:
    """Lock the run against other submissions; yields ``<run>/slurm``."""
    folder = run_dir / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".submitting"):
        yield folder


def job_name(config: Config, stage: str) -> str:
    """Name of a stage's job in `squeue`."""
    return slurm_cli.plain(f"{config.name}-{stage}")


def known_jobs(config: Config) -> dict[str, Job]:
    """Return the jobs submitted for this run, by stage, in their present state. Raises SlurmError if Slurm fails."""
    record = Record.read(config.run_dir)
    if record is None or record.cluster != "slurm":
        return {}
    stages = {job: stage for stage, job in record.jobs.items() if stage in config.stages or stage in record.then}
    found = slurm_cli.look_up({job: job_name(config, stage) for job, stage in stages.items()})
    return {stages[id]: job for id, job in found.items()}
