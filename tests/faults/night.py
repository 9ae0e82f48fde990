"""A night of a paper-shaped run in virtual time: steps lost, goodput and disk under node failures and time limits.

  python tests/faults/night.py                                 the table of docs/failures.md: 12 hours of one RTX 3090
  python tests/faults/night.py --gpu h100 --world 8 --failures 2 100

The seconds of a step and of a checkpoint are the planner's. When to save, what a stop leaves, and which checkpoints
stay on disk is decided by the very code that decides in training, on a clock that is turned by hand. Failures come at
random (exponential times); each costs what was not yet on disk, and the time until the job runs again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hive_scale import presets
from hive_scale.checkpoint.checkpointer import Retention
from hive_scale.checkpoint.format import steps_in
from hive_scale.config import Config
from hive_scale.plan.devices import find
from hive_scale.plan.run import Machine, StagePlan, checkpoint_seconds, plan_run
from hive_scale.resilience.checkpoint_interval import DAY, CheckpointInterval

START = 60.0  # seconds from a job's start to its first step
HOST_COPY = 5e9  # bytes/s per process, of a checkpoint into host memory: what training waits for
PAIRS = 595_375  # of LLaVA-CC3M-Pretrain-595K


@dataclass
class Night:
    """The clock, and where its seconds have gone."""

    config: Config
    machine: Machine
    draw: random.Random
    failures: float  # a day, of the whole job
    limit: float  # seconds of an allocation
    wait: float  # seconds until a job runs again, on the mean
    folder: Path
    now: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("steps", "save", "lost", "start", "down"), 0.0)
    )
    lost_steps: int = 0
    attempts: int = 0
    disk: float = 0.0  # bytes, at most

    def __post_init__(self) -> None:
        self.fails_at = self._next_failure()
        self.ends_at = 0.0  # of the allocation: none yet

    def pass_by(self, seconds: float, account: str) -> None:
        self.now += seconds
        self.seconds[account] += seconds

    def begin(self) -> None:
        """A job of its own: the wait for it, its start."""
        self.attempts += 1
        if self.attempts > 1:
            self.pass_by(self.draw.expovariate(1 / self.wait), "down")
        self.ends_at = self.now + self.limit
        self.fails_at = self._next_failure()
        self.pass_by(START, "start")

    def _next_failure(self) -> float:
        return self.now + (self.draw.expovariate(self.failures / DAY) if self.failures else inf)

    def stage(self, plan: StagePlan, before: float, end: float) -> bool:
        """Train one stage, and say whether it came to its end. `before`: bytes that earlier stages have left."""
        directory = self.folder / plan.stage
        writing, copying = checkpoint_seconds(plan, self.machine), plan.checkpoint / self.machine.world / HOST_COPY
        durable = 0  # the step that the next attempt begins at
        while self.now < end:
            retention = Retention(directory, self.config.keep)
            cadence = CheckpointInterval(
                self.config.save_interval,
                self.config.expected_failures_per_day,
                self.config.grace_seconds,
                self.ends_at - self.now,
                lambda: self.now,
            )
            step, being_written, done_at = durable, 0, inf
            while step < plan.steps and self.now < min(end, self.fails_at) and not cadence.time_is_up():
                self.pass_by(plan.time.total, "steps")
                step += 1
                if self.now >= done_at:
                    durable, done_at = being_written, inf
                    self._saved(retention, directory, durable, plan, before)
                cadence.stepped(writing if durable else 0.0)
                if cadence.due(step) and done_at == inf:
                    self.pass_by(copying, "save")
                    cadence.saved(copying)
                    being_written, done_at = step, self.now + writing
            if self.now < self.fails_at or self.now >= end:  # time is up, or the stage is done: it saves and waits
                self.pass_by(copying + writing, "save")
                durable = step
                self._saved(retention, directory, durable, plan, before)
            lost = step - durable
            self.lost_steps += lost
            self.seconds["lost"] += lost * plan.time.total
            self.seconds["steps"] -= lost * plan.time.total
            if durable >= plan.steps:
                return True
            if self.now < end:
                self.begin()
        return False

    def _saved(self, retention: Retention, directory: Path, step: int, plan: StagePlan, before: float) -> None:
        path = directory / f"step_{step:08d}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "manifest.json").touch()
        retention.saved(path, {"eval_loss": None})
        # and the one that is being written when the next comes
        self.disk = max(self.disk, before + (len(steps_in(directory)) + 1) * plan.checkpoint)


def night(config: Config, machine: Machine, plans: list[StagePlan], arguments: argparse.Namespace, seed: int) -> Night:
    with tempfile.TemporaryDirectory() as folder:
        one = Night(
            config,
            machine,
            random.Random(seed),
            arguments.rate,
            arguments.limit * 3600,
            arguments.wait * 60,
            Path(folder),
        )
        one.begin()
        weights = 4.0 * sum(sum(both) for both in plans[0].components.values())
        for number, plan in enumerate(plans):
            if not one.stage(plan, number * weights, arguments.hours * 3600):
                break
        return one


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="paper_siglip")
    parser.add_argument("--gpu", default="rtx3090")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--hours", type=float, default=12.0, help="of the night")
    parser.add_argument("--limit", type=float, default=4.0, help="hours of one allocation")
    parser.add_argument("--wait", type=float, default=10.0, help="minutes until a job runs again, on the mean")
    parser.add_argument("--failures", type=float, nargs="+", default=[0, 2, 10, 50], help="a day, as they happen")
    parser.add_argument("--nights", type=int, default=20, help="for each")
    arguments = parser.parse_args()
    config = presets.load(arguments.preset, None, ["engine.precision=bf16"])
    machine = Machine(find(arguments.gpu), arguments.world)
    plans = plan_run(config, machine, PAIRS)
    hours = ", ".join(f"{plan.stage} {plan.hours:.1f} h" for plan in plans)
    where = f"{arguments.preset} on {arguments.world} x {machine.gpu.title}"
    print(f"{where}: {hours}; medians of {arguments.nights} nights\n")
    print("| failures a day | starts | steps lost | of all | goodput | saving | lost | start | down | disk, GB |")
    print("| --- " * 10 + "|")
    for rate in arguments.failures:
        arguments.rate = rate
        nights = [night(config, machine, plans, arguments, seed) for seed in range(arguments.nights)]

        def share(account: str, of: list[Night] = nights) -> str:
            return f"{statistics.median(one.seconds[account] / one.now for one in of):.1%}"

        starts = statistics.median(one.attempts for one in nights)
        lost = statistics.median(one.lost_steps for one in nights)
        disk = max(one.disk for one in nights) / 1e9
        row = [f"{rate:g}", f"{starts:g}", f"{lost:g}", f"{lost / sum(plan.steps for plan in plans):.1%}"]
        row += [share("steps"), *(share(account) for account in ("save", "lost", "start", "down")), f"{disk:.0f}"]
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
