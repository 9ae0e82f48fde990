"""Status of a run's stages: from their own files, and from Slurm's view of their jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from math import inf, nan
from statistics import median
from typing import Any

from rich.live import Live
from rich.table import Table

from hive_scale.checkpoint.stage_files import is_stage_done
from hive_scale.config import Config
from hive_scale.observability import goodput
from hive_scale.observability.console import console
from hive_scale.observability.metrics import read_metrics
from hive_scale.slurm import chain, slurm_cli
from hive_scale.slurm.chain import Link, Record
from hive_scale.slurm.downstream import Followers
from hive_scale.slurm.job import lost_nodes, read_attempts
from hive_scale.slurm.resources import Resources

POLL = 2.0  # seconds between updates
LONGEST = 1e9  # seconds; longer estimates of the time left are not shown


def show_plan(
    links: Sequence[Link], asked: Mapping[str, Resources], costs: Mapping[str, str], jobs: Mapping[str, str]
) -> None:
    """Print what was, or would be, submitted, with each stage's planned cost if known."""
    planned = ("planned, per GPU",) if any(costs.values()) else ()
    table = Table("stage", "", "job", "after", "nodes x processes", "slices of", *planned)
    for link in links:
        resources = asked[link.stage]
        size = f"{resources.nodes} x {resources.tasks}"
        row = (jobs.get(link.stage, ""), link.after, size, str(timedelta(minutes=resources.minutes)))
        known = (costs.get(link.stage, ""),) if planned else ()
        table.add_row(link.stage, link.verb, *((*row, *known) if link.verb != "done" else ()))
    console.print(table)


def show(config: Config, follow_jobs: bool) -> int:
    """Print the table, or keep it updated until no job is left. Returns 0 if the run is done, else 1."""
    if follow_jobs:
        with suppress(KeyboardInterrupt):
            follow(config, until=lambda: not any(job.is_active for job in chain.known_jobs(config).values()))
    else:
        console.print(_table(config))
    for stage, nodes in _lost(config).items():
        console.print(f"{stage} lost a task or a device on {', '.join(nodes)}", soft_wrap=True, markup=False)
    return 0 if set(_states(config).values()) == {"done"} else 1


def follow(config: Config, until: Callable[[], bool]) -> None:
    """Show the table as it changes until `until` returns True; without a terminal, print a line per change of state.

    Raises KeyboardInterrupt on Ctrl-C.
    """
    states: dict[str, str] = {}
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        while True:
            is_last = until()  # asked first, so that one more update follows
            now = _states(config)
            if console.is_terminal:
                live.update(_table(config), refresh=True)
            else:
                for stage in (stage for stage in now if now[stage] != states.get(stage)):
                    console.print(f"{datetime.now():%H:%M:%S}  {stage:<12} {now[stage]}", soft_wrap=True, markup=False)
                states = now
            if is_last:
                break
            time.sleep(POLL)
    if not console.is_terminal:
        console.print(_table(config))


def done_stages(config: Config, then: Followers) -> list[str]:
    """Names of the finished stages and downstream jobs."""
    trained = [stage for stage in config.stages if is_stage_done(config.run_dir / stage)]
    return trained + [name for name, follower in then.items() if follower.is_done(config.run_dir, name)]


def _states(config: Config) -> dict[str, str]:
    record = Record.read(config.run_dir) or Record()
    jobs = chain.known_jobs(config) if slurm_cli.is_here() else {}  # without Slurm, rely on files alone
    done = done_stages(config, record.followers())
    states = {}
    for stage in (*config.stages, *record.then):
        job = jobs.get(stage)
        if stage in done:
            states[stage] = "done"
        elif job and job.state:
            states[stage] = f"{job.state.lower()} {job.reason}"
        else:
            states[stage] = "submitted" if stage in record.jobs else "-"
    return states


def _lost(config: Config) -> dict[str, list[str]]:
    """Nodes on which the present jobs have lost a task or a device, by stage."""
    jobs, folder = (Record.read(config.run_dir) or Record()).jobs, lost_nodes(config.run_dir)
    found = {stage: sorted(path.name for path in folder.glob(f"{job}/*")) for stage, job in jobs.items()}
    return {stage: nodes for stage, nodes in found.items() if nodes}


def _table(config: Config) -> Table:
    table = Table("stage", "state", "step", "loss", "samples/s", "time left", "starts", "goodput")
    steps = (Record.read(config.run_dir) or Record()).steps
    attempts = read_attempts(config.run_dir)
    for stage, state in _states(config).items():
        starts = sum(attempt["event"] == "begin" and attempt["stage"] == stage for attempt in attempts)
        if stage not in config.stages:  # downstream jobs have no steps
            table.add_row(stage, state, "", "", "", "", str(starts or ""), "")
            continue
        lines = read_metrics(config.run_dir / stage / "metrics.jsonl")
        row = _progress(lines, steps.get(stage, 0), config.stages[stage].global_batch)
        # share of the time in which the stage held its nodes; time in the queue does not count
        share = f"{goodput.share(lines[-1].get('spent', {}) | {'down': 0.0}):.0%}" if lines else ""
        table.add_row(stage, state, *row, str(starts or ""), share)
    return table


def _progress(lines: Sequence[Mapping[str, Any]], num_steps: int, global_batch: int) -> tuple[str, str, str, str]:
    if not lines:
        return f"0/{num_steps}", "", "", ""
    step, pace = lines[-1]["step"], median(line.get("seconds", inf) for line in lines[-20:])
    seconds = (num_steps - step) * pace
    left = str(timedelta(seconds=round(seconds))) if 0 <= seconds < LONGEST else ""
    return f"{step}/{num_steps}", f"{lines[-1].get('loss', nan):.4f}", f"{global_batch / pace:.0f}", left
