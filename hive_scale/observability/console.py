"""Progress of a stage on the screen: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from hive_scale.strangers import printable

INTERVAL = 10.0  # seconds between plain lines
MEMORY = 0.9  # decay per step of the moving average of the pace


class Screen(Console):
    """Console that prints text literally, in tables too: no markup, no emoji, no terminal control characters."""

    def __init__(self) -> None:
        super().__init__(highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text, lines=True), **how)


console = Screen()


class StageView:
    """Progress bar or lines of one stage, on rank 0."""

    def __init__(self, title: str, num_steps: int, done_steps: int) -> None:
        self._title, self._num_steps, self._done_steps = title, num_steps, done_steps
        self._pace = 0.0  # seconds per step, moving average
        self._spoken = time.monotonic()
        # a Slurm job writes to a file, even if srun provides a terminal
        self._plain = not console.is_terminal or "SLURM_JOB_ID" in os.environ
        columns = TextColumn("{task.description:<10}", markup=False), BarColumn(bar_width=16), MofNCompleteColumn()
        now = TextColumn("{task.fields[now]}", markup=False)
        self._bar = Progress(*columns, now, console=console, disable=self._plain)
        self._task = self._bar.add_task(printable(title), total=num_steps, completed=done_steps, now="")

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def show(self, line: Mapping[str, Any], samples: int, tokens: int) -> None:
        """Show a step. `line` is as in `metrics.jsonl`; `samples` and `tokens` are those of this step alone."""
        step = line["step"]
        # ignore the first step, which is slowed by warm-up
        trusted = MEMORY if step > self._done_steps + 2 else 0.0
        self._pace = trusted * self._pace + (1 - trusted) * line["seconds"]
        text = describe(line, samples, tokens, (self._num_steps - step) * self._pace)
        self._bar.update(self._task, completed=step, now=text)
        now = time.monotonic()
        if self._plain and (step in (1, self._num_steps) or now - self._spoken > INTERVAL):
            self._spoken = now
            console.print(f"{self._title} {step}/{self._num_steps}  {text}", soft_wrap=True)


def describe(line: Mapping[str, Any], samples: int, tokens: int, seconds_left: float) -> str:
    """Format a step's metrics as one line for people."""
    seconds = line["seconds"]
    parts = [f"loss {line['loss']:.3f}", f"{samples / seconds:.0f} samples/s", f"{tokens / seconds:.0f} tokens/s"]
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    parts += [
        f"ETA {_clock(seconds_left)}",
        f"data {line['data_seconds'] / seconds:.0%}",
        f"{line['memory_gb']:.2f} GB",
        f"lr {max(line['lr'].values()):.1e}",
        f"grad {line['grad_norm']:.2f}",
    ]
    if "eval_loss" in line:
        parts.append(f"held-out {line['eval_loss']:.3f}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
