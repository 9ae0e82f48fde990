"""Submit a run: validate everything, snapshot the code, write each stage's script, submit the jobs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import submitit

from hive_scale.config import Config
from hive_scale.rundir import check_place
from hive_scale.slurm import chain, code_snapshot, local, slurm_cli, status
from hive_scale.slurm.chain import Link, Record
from hive_scale.slurm.downstream import Followers
from hive_scale.slurm.downstream import order as in_order
from hive_scale.slurm.job import attempts_file, job_of
from hive_scale.slurm.resources import Resources, sbatch

Asked = Mapping[str, Resources]  # by stage


def submit(config: Config, asked: Asked, cluster: str, then: Followers, dry_run: bool = False) -> int:
    """Submit what is left of the run, or with `dry_run` print what would be submitted. Returns an exit code.

    Raises ValueError for mistakes of the user, SlurmError if Slurm refuses or is silent.
    """
    with slurm_cli.outside_of_jobs():  # the user may submit from inside a job
        return _submit_all(config, asked, cluster, then, dry_run)


def _submit_all(config: Config, asked: Asked, cluster: str, then: Followers, dry_run: bool) -> int:
    if cluster == "slurm" and not dry_run and not slurm_cli.is_here("sbatch"):
        raise ValueError("there is no sbatch here: log in to the cluster, or give --cluster local, or --dry_run")
    steps = validate(config, asked, then)
    if cluster == "slurm" and (found := set(str(config.run_dir.absolute())) & set("%:\\")):
        # Slurm would replace or drop them in the paths of logs; PYTHONPATH is cut at a colon
        raise ValueError(f"output={config.run_dir}: Slurm cannot have {' '.join(sorted(found))} in it: choose another")
    if cluster != "slurm" and not dry_run:
        return local.run(config, asked, cluster, steps, then)
    order, done = in_order(list(config.stages), then), status.done_stages(config, then)
    costs = {name: cost(config, name, asked[name], steps[name]) for name in steps if name not in done}
    if dry_run:
        links = chain.decide(order, done, chain.known_jobs(config) if slurm_cli.is_here() else {})
        status.show_plan(links, asked, costs, {})
        show_scripts(config, links, asked)
        return 0
    with chain.submitting(config.run_dir) as folder:
        links = chain.decide(order, done, chain.known_jobs(config))
        slurm_cli.cancel([link.replaces for link in reversed(links) if link.replaces])
        code = code_snapshot.take(folder / "code", config.engine.ds_config)
        record = chain.recorded(config, asked, "slurm", steps, then)
        for link in links:
            if link.verb == "submit":
                record.jobs[link.stage] = _submit(config, link, asked[link.stage], code, record)
                record.write(config.run_dir)  # written after each job, since Slurm may refuse the next
    status.show_plan(links, asked, costs, record.jobs)
    run = shlex.quote(str(config.run_dir))
    print(f"watch, read, stop, go on: python slurm/submit_pipeline.py status|logs|cancel|resume {run}")
    return 0


def validate(config: Config, asked: Asked, then: Followers) -> dict[str, int]:
    """Return the optimizer steps of each stage. Raises ValueError for mistakes that a job would find hours later."""
    from hive_scale.checkpoint.run_claims import check_owner
    from hive_scale.checkpoint.stage_files import WEIGHTS, find_weights
    from hive_scale.locate import check_sources
    from hive_scale.preflight import check, open_all

    check_place(config)
    check_owner(config)
    # a run that has begun continues from its own weights
    check_sources(config, begins=not find_weights(config.run_dir / "initial" / WEIGHTS))
    data = open_all(config, noted=False)
    check(config, data, {name: asked[name].world_size for name in config.stages}, here=False)
    for name, follower in then.items():
        try:
            follower.check(config, asked[name].world_size)
        except ValueError as error:
            raise ValueError(f"--then {name}: {error}") from None
    return {name: stage.num_steps(data[name].train.num_samples) for name, stage in config.stages.items()}


def cost(config: Config, name: str, resources: Resources, steps: int) -> str:
    """Return the planned memory and hours of a stage on the GPUs that `resources` name; "" if they name none."""
    if not resources.gpu:
        return ""
    from hive_scale.plan.devices import find
    from hive_scale.plan.run import Machine, plan_run

    gpu = replace(find(resources.gpu), per_node=resources.tasks)
    machine = Machine(gpu, resources.world_size, host_memory=float("inf"))
    stage = replace(config.stages[name], max_steps=steps)
    [plan] = plan_run(replace(config, stages={name: stage}), machine, steps * stage.global_batch)
    text = f"{plan.memory.peak / 1e9:.1f} of {plan.capacity / 1e9:.1f} GB, {plan.hours:.1f} h"
    return text if plan.fits else f"{text}: does not fit"


def show_scripts(config: Config, links: Sequence[Link], asked: Asked) -> None:
    code = config.run_dir / "slurm" / "code" / code_snapshot.fingerprint(config.engine.ds_config)
    for link in links:
        if link.verb == "submit":
            executor = _executor(config, link.stage, asked[link.stage], code, link.after and f"JOB_OF_{link.after}")
            print(f"\n# ---- {link.stage}\n{executor.script()}")


class Executor(submitit.SlurmExecutor):
    """submitit's executor, which can also write scripts on machines without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return str(self._make_submission_file_text(self._submitit_command_str, ""))


def _submit(config: Config, link: Link, resources: Resources, code: Path, record: Record) -> str:
    """Submit one stage's job and return its id."""
    if config.engine.ds_config:  # use the snapshot's copy
        config = replace(
            config, engine=replace(config.engine, ds_config=str(code.absolute() / code_snapshot.DS_CONFIG))
        )
    executor = _executor(config, link.stage, resources, code, record.jobs[link.after] if link.after else "")
    try:
        return str(executor.submit(job_of(config, link.stage, record.followers(), resources.attempts)).job_id)
    except submitit.core.utils.FailedJobError as error:
        raise slurm_cli.SlurmError(f"{link.stage}: {str(error).strip().splitlines()[-1]}") from error


def _executor(config: Config, stage: str, resources: Resources, code: Path, after: str) -> Executor:
    # reaching the time limit is no failure here, so submitit must not limit these restarts
    notes = attempts_file(config.run_dir).parent.absolute()
    executor = Executor(notes / "logs", 10**6, python=resources.python or None)
    name = chain.job_name(config, stage)
    executor.update_parameters(**sbatch(resources, name, code.absolute(), config.data_of(stage), after, notes))
    return executor
