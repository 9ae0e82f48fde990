"""Plot `metrics.jsonl` with wandb and TensorBoard, in a process of its own.

``python -m hive_scale.observability.trackers KIND RUN STAGE STEP`` follows the metrics of a stage that resumes after
STEP, until its standard input ends; KIND is tensorboard, online or offline.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol, cast

from hive_scale import config as configs
from hive_scale.atomic import write_text
from hive_scale.config import LogConfig
from hive_scale.observability.metrics import Line, MetricsTail, flat, read_metrics

PROJECT = "hive_scale"
INTERVAL = 0.5  # seconds between reads of the file


class Sink(Protocol):
    """Receiver of metrics lines, one per step."""

    def draw(self, line: Line) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """One wandb run per pipeline and stage, with a fixed id, so that a restart continues the same run."""

    def __init__(self, mode: str, run_dir: Path, stage: str, done_steps: int) -> None:
        import wandb

        config = configs.load(run_dir / "config.yaml")
        recipe = asdict(config) | {"stages": {stage: asdict(config.stages[stage])}}
        settings = wandb.Settings(
            mode=cast(Any, mode), silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=config.name,
            name=f"{config.name}/{stage}",
            id=wandb_id(run_dir, stage),
            resume="allow",
            dir=run_dir,
            config=recipe,
            settings=settings,
        )
        # online, the server knows its last step; an offline segment starts where training resumed
        self._drawn = self._run.step - 1 if mode == "online" else done_steps

    def draw(self, line: Line) -> None:
        if line["step"] > self._drawn:
            self._drawn = line["step"]
            self._run.log(flat(line), step=self._drawn)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files under `<run>/tensorboard/<stage>`; `purge_step` hides events after the step resumed from."""

    def __init__(self, run_dir: Path, stage: str, done_steps: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard" / stage), purge_step=done_steps + 1)
        self._drawn = done_steps

    def draw(self, line: Line) -> None:
        if line["step"] > self._drawn:
            self._drawn = line["step"]
            for name, value in flat(line).items():
                self._writer.add_scalar(name, value, self._drawn, walltime=line.get("time"))

    def close(self) -> None:
        self._writer.close()


def wandb_id(run_dir: Path, stage: str) -> str:
    """Return the fixed wandb id of a run's stage, which is created on first use."""
    path = run_dir / "log_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return f"{path.read_text()}-{stage}"


def replay(run_dir: Path, mode: str) -> list[str]:
    """Send the metrics of every stage of a run to wandb and return the ids of the wandb runs.

    Steps that wandb's server already has are skipped.
    """
    import wandb

    ids = []
    for stage in configs.load(run_dir / "config.yaml").stages:
        if lines := read_metrics(run_dir / stage / "metrics.jsonl"):
            sink = Wandb(mode, run_dir, stage, done_steps=0)
            for line in lines:
                sink.draw(line)
            sink.close()
            ids.append(wandb_id(run_dir, stage))
    wandb.teardown()  # waits until finished runs are written to disk
    return ids


def follow(sink: Sink, path: Path) -> None:
    """Draw present and future lines of `path` until standard input ends."""
    follower, ended = MetricsTail(path), False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], INTERVAL)[0])
        for line in follower.lines():
            sink.draw(line)
    sink.close()


def main(kind: str, run: str, stage: str, step: str) -> None:
    os.nice(10)  # lower priority than training
    run_dir, done_steps = Path(run), int(step)
    sink: Sink = (
        TensorBoard(run_dir, stage, done_steps) if kind == "tensorboard" else Wandb(kind, run_dir, stage, done_steps)
    )
    follow(sink, run_dir / stage / "metrics.jsonl")


if __name__ == "__main__":
    main(*sys.argv[1:])


ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds that the end of a stage waits for trackers to finish


class TrackerProcess:
    """Process that plots one stage. `kind` is tensorboard, or a wandb mode (online, offline)."""

    def __init__(self, kind: str, run_dir: Path, stage: str, done_steps: int) -> None:
        self._report = run_dir / "logs" / f"{kind}.log"
        self._report.parent.mkdir(parents=True, exist_ok=True)
        beside = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        words = [kind, str(run_dir.resolve()), stage, str(done_steps)]
        with self._report.open("ab") as report:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hive_scale.observability.trackers", *words],
                stdin=subprocess.PIPE,  # its end tells the tracker to end, even if this process is killed
                stdout=report,
                stderr=report,
                env=os.environ | {"PYTHONPATH": beside},
                start_new_session=True,  # Ctrl-C goes to training only
            )
        self._kind, self._told = "TensorBoard" if kind == "tensorboard" else "wandb", False

    def failed(self) -> str:
        """Return a message, once, if the process has ended early; else ""."""
        return self._tell("failed") if self._process.poll() is not None else ""

    def close(self) -> str:
        """Let the process draw the last lines and wait for it; return a message if it failed or is slow, else ""."""
        cast(IO[bytes], self._process.stdin).close()
        try:
            return self._tell("failed") if self._process.wait(PATIENCE) else ""
        except subprocess.TimeoutExpired:
            return self._tell(f"still draws after {PATIENCE:.0f} s, and is left to itself")

    def _tell(self, what: str) -> str:
        told, self._told = self._told, True
        return "" if told else f"{self._kind} {what} (see {self._report}); training goes on, metrics.jsonl has it all"


def open_trackers(config: LogConfig, run_dir: Path, stage: str, done_steps: int) -> list[TrackerProcess]:
    """Start one process per tracker, so that a slow network cannot delay a step."""
    return [TrackerProcess(kind, run_dir, stage, done_steps) for kind in _kinds(config)]


def _kinds(config: LogConfig) -> Sequence[str]:
    mode = os.environ.get("WANDB_MODE", config.wandb)  # wandb's own variable takes precedence
    mode = {"disabled": "off", "dryrun": "offline"}.get(mode, mode)
    return [*([] if mode == "off" else [mode]), *(["tensorboard"] if config.tensorboard else [])]
