"""Progress on the screen: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from io import TextIOBase
from typing import IO, Any, TextIO, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from hive_scale.exit_codes import say
from hive_scale.strangers import printable

INTERVAL = 10.0  # seconds between plain lines
MEMORY = 0.9  # decay per step of the moving average of the pace
BAR = 16  # width of the bar, in columns
LEAST_NAME, NAME = 10, 24  # columns of the name before the bar; a longer one is cut
GAPS = 3  # spaces between name, bar, counter and text
T = TypeVar("T")


class Screen(Console):
    """Console that prints text literally, in tables too: no markup, no emoji, no terminal control characters.

    It prints to stdout; or, without any style, to `file`.
    """

    def __init__(self, file: IO[str] | None = None) -> None:
        styled = None if file is None else False  # None: if stdout is a terminal
        super().__init__(highlight=False, markup=False, emoji=False, file=file, force_terminal=styled)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text, lines=True), **how)


console = Screen()


class ForgivingFile(TextIOBase):
    """Text file for a screen that may be lost: once it cannot be written, what follows goes nowhere.

    The reader of a pipe may end, and the disk of a job's output may be full; neither may end a run.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._is_lost = file, False

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed has an attribute; rich reads it
        return self._file.encoding

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._file.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._file.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self._is_lost = True
        say(f"warning: the output cannot be written ({error.strerror}): the run goes on, and its log is kept in logs/")
        # what the file still buffers would fail again when Python ends, and change the exit code
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self._file.fileno())


class ProgressView:
    """A bar on a terminal; elsewhere a line every `INTERVAL` seconds."""

    def __init__(self) -> None:
        # a Slurm job writes to a file, even if srun provides a terminal
        self._plain = not console.is_terminal or "SLURM_JOB_ID" in os.environ
        columns = (
            TextColumn(f"{{task.description:<{LEAST_NAME}}}", markup=False),
            BarColumn(bar_width=BAR),
            MofNCompleteColumn(),
        )
        now = TextColumn("{task.fields[now]}", markup=False)
        self._bar = Progress(*columns, now, console=console, disable=self._plain)
        self._spoken = time.monotonic()

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def track(self, items: Iterable[T], title: str) -> Iterator[T]:
        """Yield `items`, and show how many of them are done."""
        total = len(items) if isinstance(items, Sized) else None
        task = self._bar.add_task(_name(title), total=total, now="")
        self._fit()
        try:
            for number, item in enumerate(items, 1):
                yield item
                self._bar.update(task, completed=number)
                self._say(f"{title} {number:,}" + (f"/{total:,}" if total else ""))
        finally:
            self._bar.remove_task(task)
            self._fit()

    def _fit(self) -> None:
        """Called when the columns that name and counter take may have changed."""

    def _say(self, text: str, always: bool = False) -> None:
        """Print a plain line, if the screen is no terminal and the last line is some seconds old."""
        now = time.monotonic()
        if self._plain and (always or now - self._spoken > INTERVAL):
            self._spoken = now
            console.print(text, soft_wrap=True)


def track(items: Iterable[T], title: str) -> Iterator[T]:
    """Yield `items`, and show how many of them are done."""
    view = ProgressView()
    view.start()
    try:
        yield from view.track(items, title)
    finally:
        view.stop()


class StageView(ProgressView):
    """Progress of one stage, on rank 0."""

    def __init__(self, title: str, num_steps: int, done_steps: int) -> None:
        super().__init__()
        self._title, self._num_steps, self._done_steps = title, num_steps, done_steps
        self._pace = 0.0  # seconds per step without evaluation, moving average
        self._evaluating = 0.0  # seconds of all evaluations so far
        self._parts: dict[str, str] = {}  # of the last step
        self._task = self._bar.add_task(_name(title), total=num_steps, completed=done_steps, now="")

    def show(self, line: Mapping[str, Any], samples: int, tokens: int) -> None:
        """Show a step. `line` is as in `metrics.jsonl`; `samples` and `tokens` are those of this step alone.

        An evaluation leaves a line of its own.
        """
        step, place = line["step"], f"{self._title} {line['step']}/{self._num_steps}"
        # ignore the first step, which is slowed by warm-up
        trusted = MEMORY if step > self._done_steps + 2 else 0.0
        self._pace = trusted * self._pace + (1 - trusted) * _training_seconds(line)
        self._evaluating += line.get("eval_seconds", 0.0)
        pace = self._pace + self._evaluating / max(1, step - self._done_steps)
        self._parts = describe(line, samples, tokens, (self._num_steps - step) * pace)
        self._bar.update(self._task, completed=step)
        self._fit()
        self._say(f"{place}  {'  '.join(self._parts.values())}", step in (self._done_steps + 1, self._num_steps))
        if "eval_loss" in line:
            console.print(f"{place}  held-out loss {line['eval_loss']:.4f}{_took(line)}", soft_wrap=True)

    def _fit(self) -> None:
        """Put as much of the last step beside the bar as the terminal has room for."""
        tasks = self._bar.tasks
        names = max(cell_len(f"{task.description:<{LEAST_NAME}}") for task in tasks)
        counters = max(2 * len(str(int(task.total or 0))) + 1 for task in tasks)
        self._bar.update(self._task, now=fitted(self._parts, console.width - names - BAR - counters - GAPS))


# what is shown of a step, the least important first: where there is no room for all, parts go in this order
LEAST = ("grad", "lr", "memory", "data", "tokens", "mfu", "samples", "eta", "loss")


def describe(line: Mapping[str, Any], samples: int, tokens: int, seconds_left: float) -> dict[str, str]:
    """Format a step's metrics for people, in the order to show them; the keys are those of `LEAST`."""
    seconds = _training_seconds(line)
    parts = {
        "loss": f"loss {line['loss']:.3f}" if "loss" in line else "",
        "samples": f"{samples / seconds:.0f} samples/s",
        "tokens": f"{tokens / seconds:.0f} tokens/s",
        "mfu": f"MFU {line['mfu']:.1%}" if "mfu" in line else "",
        "eta": f"ETA {clock(seconds_left)}",
        "data": f"data {line['data_seconds'] / seconds:.0%}",
        "memory": f"{line['memory_gb']:.2f} GB",
        "lr": f"lr {max(line['lr'].values()):.1e}",
        "grad": f"grad {line['grad_norm']:.2f}",
    }
    return {name: text for name, text in parts.items() if text}


def fitted(parts: Mapping[str, str], width: int) -> str:
    """The `parts` that fit into `width` columns, without the least important ones."""
    kept = dict(parts)
    for name in LEAST:
        if cell_len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())


def clock(seconds: float) -> str:
    """Seconds as ``h:mm:ss``, or ``m:ss`` below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _training_seconds(line: Mapping[str, Any]) -> float:
    """Seconds of a step without the evaluation that followed it."""
    return max(1e-6, float(line["seconds"] - line.get("eval_seconds", 0.0)))


def _took(line: Mapping[str, Any]) -> str:
    return f"  in {clock(line['eval_seconds'])}" if "eval_seconds" in line else ""


def _name(title: str) -> str:
    text = Text(printable(title))
    text.truncate(NAME, overflow="ellipsis")
    return text.plain
