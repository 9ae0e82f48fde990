"""Code that runs inside a Slurm job: a picklable callable for one stage or downstream job, which resumes."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from hive_scale import config as configs
from hive_scale import credentials, heartbeat
from hive_scale.checkpoint.stage_files import is_stage_done
from hive_scale.config import Config
from hive_scale.exit_codes import HALTED, TRY_AGAIN, Stopped, ended
from hive_scale.resilience.preemption import STOP
from hive_scale.slurm.downstream import DownstreamJob, Followers
from hive_scale.strict_json import append_line, read_lines

logger = logging.getLogger(__name__)
PATIENCE = 300.0  # seconds to wait for processes of the previous attempt to exit


@dataclass(frozen=True)
class ChainJob(ABC):
    """Does one stage of a run, or a downstream job. Work that is done already is only checked.

    It is therefore harmless that Slurm may run a job again after success, or before its predecessor has succeeded.
    """

    config: Config
    stage: str
    attempts: int

    def __call__(self) -> int:
        """Run, and return the exit code. Under Slurm it exits with that code; on TRY_AGAIN the job's script requeues
        the job.
        """
        heartbeat.note_lost_nodes(lost_nodes(self.config.run_dir) / job_id())
        return leave(ended(self._run))

    @abstractmethod
    def _run(self) -> int: ...

    @abstractmethod
    def is_done(self) -> bool: ...

    @abstractmethod
    def position(self) -> str:
        """Describe where it would start now. Attempts that begin at the same position have made no progress."""

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit for a signal that arrives before anything else: requeue the same job."""
        return DelayedSubmission(self)

    def begin(self, began: datetime) -> None:
        """Record this attempt before it joins the other processes, which may be where it fails.

        Raises ValueError if `attempts` in a row began at the same position, or if the attempt cannot be recorded and
        so not be counted.
        """
        at = self.position()
        before = [line for line in read_attempts(self.config.run_dir) if line["event"] == "begin"]
        mine = [line for line in before if line["job"] == job_id()]
        stuck = len(list(takewhile(lambda line: line.get("at") == at, reversed(mine))))
        if stuck >= self.attempts and not self.is_done():
            raise ValueError(
                f"{stuck} attempts in a row began at {at} and saved no step: see the log for what ended them; give "
                "slurm.grace or slurm.hours more time if a step and a save do not fit; then submit again"
            )
        try:
            nodes, restart = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()), restarts()
            self.note("begin", began, at=at, nodes=nodes, restart=restart)
        except OSError as error:
            path = attempts_file(self.config.run_dir)
            raise ValueError(f"{path} cannot be written ({error.strerror}): see to it, then submit again") from None

    def end(self, code: int) -> None:
        with suppress(OSError):  # the work is done, even if this record cannot be written
            self.note("end", datetime.now(), code=code)

    def note(self, event: str, when: datetime, **what: Any) -> None:
        time = when.astimezone().isoformat(timespec="milliseconds")
        line = {"event": event, "stage": self.stage, "job": job_id(), "time": time}
        append_line(attempts_file(self.config.run_dir), line | what)


class StageJob(ChainJob):
    """Trains `stage` and any unfinished stage before it."""

    def _run(self) -> int:
        began = datetime.now()
        credentials.recall(self.config.run_dir)
        with noting() as asked:
            return self._train(began, asked)

    def _train(self, began: datetime, asked: list[int]) -> int:
        from hive_scale.distributed import rank, session
        from hive_scale.pipeline import run_pipeline
        from hive_scale.resilience.preemption import end_of_stop

        if rank() == 0:
            self.begin(began)
        code = 0
        with session() as world:
            is_over, is_asked = world.sum(world.is_main and self.is_done(), len(asked))
            try:
                if is_asked and not is_over:
                    raise Stopped("stopped before it began")
                if not is_over:
                    run_pipeline(self.config, world, until=self.stage, patience=PATIENCE)
            except Stopped as stopped:
                code = end_of_stop(stopped, self.config.run_dir, world)
            if world.is_main:
                self.end(code)
        return code

    def is_done(self) -> bool:
        """True if this stage and all before it are done, so that not even the lock is needed."""
        names = list(self.config.stages)
        return all(is_stage_done(self.config.run_dir / name) for name in names[: names.index(self.stage) + 1])

    def position(self) -> str:
        return position(self.config)


@dataclass(frozen=True)
class DownstreamChainJob(ChainJob):
    """Runs a launcher on the trained run."""

    follower: DownstreamJob

    def _run(self) -> int:
        from hive_scale.distributed import rank

        began, is_main = datetime.now(), rank() == 0
        credentials.recall(self.config.run_dir)
        if is_main:
            self.begin(began)
        # training handles signals itself; other launchers have written all results they need not compute again
        with handling(lambda *_: heartbeat.leave(TRY_AGAIN)):
            code = 0 if self.is_done() else self._follow()
        if is_main:
            self.end(code)
            if code == 0:
                self.follower.mark_done(self.config.run_dir, self.stage)
        return code

    def _follow(self) -> int:
        for folder in (self.config.run_dir, self.follower.output):
            if (folder / STOP).exists():
                print(f"{self.stage} is stopped before it began. Remove {folder / STOP}, then submit again", flush=True)
                return HALTED
        return self.follower.run()

    def is_done(self) -> bool:
        return self.follower.is_done(self.config.run_dir, self.stage)

    def position(self) -> str:
        """The newest checkpoint if the launcher trains, else the number of bytes written."""
        output = self.follower.output
        if (output / "config.yaml").is_file():
            return f"{self.stage}, {position(configs.load(output / 'config.yaml'))}"
        return f"{self.stage}, {sum(path.stat().st_size for path in output.rglob('*') if path.is_file())} bytes"


def job_of(config: Config, name: str, then: Followers, attempts: int) -> ChainJob:
    """Return the job of a stage, or of one of the downstream jobs `then`."""
    return DownstreamChainJob(config, name, attempts, then[name]) if name in then else StageJob(config, name, attempts)


def leave(code: int) -> int:
    """Under Slurm, exit with a nonzero `code`, which the job's script must see; else return it."""
    if code and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        sys.exit(code)
    return code


@contextmanager
def noting() -> Iterator[list[int]]:
    """Collect signals while libraries are imported; no work is lost then, and submitit would act on them itself."""
    asked: list[int] = []
    with handling(lambda number, _: asked.append(number)):
        yield asked


@contextmanager
def handling(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def position(config: Config) -> str:
    """Position of a run: ``language:120`` is 120 steps of stage `language` in its newest checkpoint; or ``end``."""
    from hive_scale.checkpoint.format import step_of, steps_in

    for name in config.stages:
        if not is_stage_done(config.run_dir / name):
            saved = steps_in(config.run_dir / name)
            return f"{name}:{step_of(saved[-1]) if saved else 0}"
    return "end"


def job_id() -> str:
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or f"process {os.getpid()}"


def restarts() -> int:
    """Number of times that Slurm has restarted this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def attempts_file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "attempts.jsonl"


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return every start and end of a job of this run, oldest first. Truncated lines are skipped with a warning."""
    path = attempts_file(run_dir)
    lines, cut = read_lines(path)
    for number in cut:
        logger.warning("%s: line %d is cut off and left out", path, number)
    known = [line for line in lines if all(isinstance(line.get(key), str) for key in ("event", "stage", "job"))]
    if len(known) < len(lines):
        logger.warning("%s: %d lines are no attempts and left out", path, len(lines) - len(known))
    return known


def lost_nodes(run_dir: Path) -> Path:
    """Directory with a subdirectory per job, which holds an empty file for each node that lost a task or a device."""
    return attempts_file(run_dir).with_name("lost")
