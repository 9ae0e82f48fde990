"""What a person sees of a run, and what remains of it: a progress bar, and one JSON line per step."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=False, highlight=False)


class StageLog(AbstractContextManager["StageLog"]):
    """`<stage>/metrics.jsonl` and the bar of one stage. Only the main process has one that does anything.

    A resumed stage goes on after the step and the number of target tokens it resumed from: later lines, and one
    cut in its middle, are dropped.
    """

    def __init__(
        self, path: Path, title: str, num_steps: int, done_steps: int, active: bool, done_tokens: int = 0
    ) -> None:
        self.active, self.tokens = active, done_tokens
        if not active:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if line["step"] <= done_steps]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._now = time.perf_counter()
        self._title, self._num_steps = title, num_steps
        self._spoken = self._now
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=done_steps, now="")

    def __enter__(self) -> StageLog:
        if self.active:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()

    def say(self, text: str) -> None:
        if self.active:
            console.print(text, soft_wrap=True, markup=False)

    def step(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Record optimizer step `step` (1-based), after which the stage has consumed `samples` in all."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self._now = now - self._now, now
        tokens = metrics["num_tokens"]
        self.tokens += tokens
        rest = {key: value for key, value in metrics.items() if key != "num_tokens"}
        line = {"step": step, "samples": samples, "tokens": self.tokens, **rest, "seconds": round(seconds, 4)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(line, samples / step / seconds, tokens / seconds)

    def _show(self, line: Mapping[str, Any], samples_per_second: float, tokens_per_second: float) -> None:
        text = (
            f"loss {line['loss']:.3f}  lr {max(line['lr'].values()):.1e}  grad {line['grad_norm']:.2f}  "
            f"{samples_per_second:.0f} samples/s  {tokens_per_second:.0f} tokens/s  {peak_memory_gb():.2f} GB"
        )
        if "eval_loss" in line:
            text += f"  held-out {line['eval_loss']:.3f}"
        self._bar.update(self._task, completed=line["step"], now=text)
        # where there is no terminal, a line now and then
        if not console.is_terminal and (line["step"] in (1, self._num_steps) or self._now - self._spoken > 10):
            self._spoken = self._now
            console.print(f"{self._title} {line['step']}/{self._num_steps}  {text}", soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut in its middle is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def peak_memory_gb() -> float:
    """Peak of this process so far: allocated on its GPU, or resident on the host, in 1e9 bytes."""
    import torch  # here, since whoever only reads metrics needs none of it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
