"""What runs inside a job: a picklable callable that trains up to one stage, from wherever the run stands."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

from hive_scale.checkpoint.marker import is_done
from hive_scale.config import Config

SAVED = 75  # exit code of a job that was told to stop and saved: its script queues it again
HALTED = 76  # the same, but somebody asked for it with a file STOP: it stays down
PATIENCE = 300.0  # seconds for the processes of an attempt before this one to die


@dataclass(frozen=True)
class StageJob:
    """Trains `stage` and whatever before it is unfinished; a stage that is done costs a glance.

    So it does no harm that Slurm may run a job again after it has succeeded, or before its predecessor has.
    """

    config: Config
    stage: str
    attempts: int

    def __call__(self) -> int:
        """Returns 0 once the stage is done, SAVED or HALTED; under Slurm it exits with these two."""
        began = datetime.now()
        with noting() as asked:
            return self._run(began, asked)

    def _run(self, began: datetime, asked: list[int]) -> int:
        from hive_scale.distributed import session
        from hive_scale.train import Stopped, run_pipeline

        code, stop_file = 0, self.config.run_dir / "STOP"
        with session() as world:
            if world.is_main:
                self._begin(began)
            is_over, is_asked = world.sum(world.is_main and self._is_done(), len(asked))
            try:
                if is_asked and not is_over:
                    raise Stopped("stopped before it began")
                if not is_over:
                    run_pipeline(self.config, world, until=self.stage, patience=PATIENCE)
            except Stopped as stopped:
                print(f"{stopped}", flush=True)
                code = HALTED if any(world.sum(world.is_main and stop_file.exists())) else SAVED
            if world.is_main:
                self._note("end", datetime.now(), code=code)
        if code and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            sys.exit(code)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """For a signal that comes before all else: the same again."""
        return DelayedSubmission(self)

    def _is_done(self) -> bool:
        """Whether this stage and all before it are, so that not even the lock is needed."""
        names = list(self.config.stages)
        return all(is_done(self.config.run_dir / name) for name in names[: names.index(self.stage) + 1])

    def _begin(self, began: datetime) -> None:
        """Note this attempt. Raises RuntimeError if as many as allowed began where it does."""
        at = position(self.config)
        before = [line for line in read_attempts(self.config.run_dir) if line["event"] == "begin"]
        mine = [line for line in before if line["job"] == job_id()]
        stuck = len(list(takewhile(lambda line: line["at"] == at, reversed(mine))))
        if stuck >= self.attempts and not self._is_done():
            raise RuntimeError(
                f"{stuck} attempts in a row began at {at} and saved no step: see the log for what ended them; give "
                "slurm.grace or slurm.hours more time if a step and a save do not fit; then submit again"
            )
        self._note("begin", began, at=at, nodes=os.environ.get("SLURM_JOB_NODELIST", socket.gethostname()))

    def _note(self, event: str, when: datetime, **what: Any) -> None:
        path = attempts_file(self.config.run_dir)
        path.parent.mkdir(parents=True, exist_ok=True)
        time = when.astimezone().isoformat(timespec="milliseconds")
        with path.open("a") as file:
            file.write(json.dumps({"event": event, "stage": self.stage, "job": job_id(), "time": time} | what) + "\n")


@contextmanager
def noting() -> Iterator[list[int]]:
    """Collect signals while libraries are read: nothing is lost then, and submitit would act on them by itself."""
    asked: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def position(config: Config) -> str:
    """Where a run stands: ``language:120`` is 120 steps of stage `language`, as its newest checkpoint has them."""
    from hive_scale.checkpoint.snapshot import step_of, steps_in

    for name in config.stages:
        if not is_done(config.run_dir / name):
            saved = steps_in(config.run_dir / name)
            return f"{name}:{step_of(saved[-1]) if saved else 0}"
    return "end"


def job_id() -> str:
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or f"process {os.getpid()}"


def attempts_file(run_dir: Path) -> Path:
    return run_dir / "slurm" / "attempts.jsonl"


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Every start and end of a job of this run, oldest first."""
    path = attempts_file(run_dir)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
