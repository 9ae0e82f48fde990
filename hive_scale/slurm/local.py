"""Run the same chain without Slurm: stage after stage, in processes of this machine or in this process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import submitit

from hive_scale.config import Config
from hive_scale.exit_codes import TRY_AGAIN
from hive_scale.slurm import chain, code_snapshot, status
from hive_scale.slurm.downstream import Followers, order
from hive_scale.slurm.job import ChainJob, job_of
from hive_scale.slurm.resources import Resources, environment

YEAR = 365 * 24 * 60.0  # minutes; no time limit is needed, since nobody queues for this machine


def run(config: Config, asked: Mapping[str, Resources], cluster: str, steps: Mapping[str, int], then: Followers) -> int:
    """Run the unfinished stages in order. Returns 0, 1 if a stage failed, or the exit code of a stopped stage."""
    if cluster == "local" and any(resources.nodes > 1 for resources in asked.values()):
        raise ValueError("--cluster local has one node: give slurm.nodes=1")
    with chain.submitting(config.run_dir):
        record = chain.recorded(config, asked, cluster, steps, then)
        for stage in order(list(config.stages), then):
            if stage in status.done_stages(config, then):
                continue
            job = job_of(config, stage, then, asked[stage].attempts)
            if cluster == "debug":
                code = job()
            else:
                submitted = _submit(config, job, asked[stage])
                record.jobs[stage] = submitted.job_id
                record.write(config.run_dir)
                code = _wait(submitted, config)
            if code:
                return code
    return status.show(config, follow_jobs=False)


def _submit(config: Config, job: ChainJob, resources: Resources) -> submitit.Job[int]:
    executor = submitit.LocalExecutor(config.run_dir / "slurm" / "logs")
    executor.update_parameters(
        timeout_min=YEAR,
        tasks_per_node=resources.tasks,
        gpus_per_node=resources.gpus_per_node,
        stderr_to_stdout=True,
    )
    os.environ.update(environment(resources, code_snapshot.PACKAGE.parent, config.data_of(job.stage)))
    # Ctrl-C reaches every process of a terminal; trainers handle it, and submitit's process in between must survive it
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(job)
    finally:
        signal.signal(signal.SIGINT, before)


def _wait(job: submitit.Job[int], config: Config) -> int:
    try:
        status.follow(config, until=job.done)
    except KeyboardInterrupt:
        print("saving", file=sys.stderr)
        while not job.done():
            time.sleep(0.2)
    codes: list[int] = []
    for task in range(job.num_tasks):
        with suppress(submitit.core.utils.UncompletedJobError):  # it ended by another's failure, a kill, or as hung
            codes.append(job.task(task).result())
    if not any(codes) and len(codes) < job.num_tasks:
        print(f"stopped: a process of job {job.job_id} was lost: see {job.paths.stdout}", file=sys.stderr)
        return TRY_AGAIN
    return max(codes)
