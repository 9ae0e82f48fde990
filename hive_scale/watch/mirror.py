"""wandb and TensorBoard, drawn from `metrics.jsonl` by processes of their own: none of their crashes is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from hive_scale.config import LogConfig

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds that the end of a stage waits for the last lines to be drawn


class Mirror:
    """The process that draws one stage with `kind`: tensorboard, or wandb's mode. It ends when it is closed."""

    def __init__(self, kind: str, run_dir: Path, stage: str, done_steps: int) -> None:
        self._report = run_dir / "logs" / f"{kind}.log"
        self._report.parent.mkdir(parents=True, exist_ok=True)
        beside = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        words = [kind, str(run_dir.resolve()), stage, str(done_steps)]
        with self._report.open("ab") as report:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hive_scale.watch.sinks", *words],
                stdin=subprocess.PIPE,  # whose end tells it to end, however this process does
                stdout=report,
                stderr=report,
                env=os.environ | {"PYTHONPATH": beside},
                start_new_session=True,  # Ctrl-C is for the training
            )
        self._kind, self._told = "TensorBoard" if kind == "tensorboard" else "wandb", False

    def failed(self) -> str:
        """What to tell if it has ended before its time, once; else nothing."""
        return self._tell("failed") if self._process.poll() is not None else ""

    def close(self) -> str:
        """Let it draw the last lines; what to tell if it could not."""
        cast(IO[bytes], self._process.stdin).close()
        try:
            return self._tell("failed") if self._process.wait(PATIENCE) else ""
        except subprocess.TimeoutExpired:
            return self._tell(f"still draws after {PATIENCE:.0f} s, and is left to itself")

    def _tell(self, what: str) -> str:
        told, self._told = self._told, True
        return "" if told else f"{self._kind} {what} (see {self._report}); training goes on, metrics.jsonl has it all"


def open_mirrors(config: LogConfig, run_dir: Path, stage: str, done_steps: int) -> list[Mirror]:
    return [Mirror(kind, run_dir, stage, done_steps) for kind in _kinds(config)]


def _kinds(config: LogConfig) -> Sequence[str]:
    mode = os.environ.get("WANDB_MODE", config.wandb)  # wandb's own variable is the last word
    mode = {"disabled": "off", "dryrun": "offline"}.get(mode, mode)
    return [*([] if mode == "off" else [mode]), *(["tensorboard"] if config.tensorboard else [])]
