"""Log of a stage: progress on the screen, `metrics.jsonl`, and the trackers that plot it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from errno import ENOSPC
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hive_scale.config import LogConfig
from hive_scale.distributed import World
from hive_scale.observability.console import StageView, console
from hive_scale.observability.logging_setup import tell_others
from hive_scale.observability.metrics import SCHEMA, numbers, read_metrics, rewrite
from hive_scale.observability.trackers import open_trackers
from hive_scale.strict_json import dumps

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StageLog(AbstractContextManager["StageLog"]):
    """Writes `<stage>/metrics.jsonl` and starts what displays it. Does nothing except on the main process.

    A resumed stage continues after the step and the number of target tokens of its checkpoint: later lines, and a
    truncated one, are dropped.
    """

    def __init__(
        self, stage_dir: Path, num_steps: int, done_steps: int, done_tokens: int, config: LogConfig, world: World
    ) -> None:
        self.active, self.tokens = world.is_main, done_tokens
        if not self.active:
            return
        self._dir = stage_dir
        self._path = stage_dir / "metrics.jsonl"
        stage_dir.mkdir(parents=True, exist_ok=True)
        before = read_metrics(self._path)
        kept = [line for line in before if line["step"] <= done_steps]
        rewrite(self._path, kept)
        self._restarts = before[-1].get("restarts", 0) + 1 if before else 0
        self._samples = int(kept[-1].get("samples", 0)) if kept else 0
        self._view = StageView(stage_dir.name, num_steps, done_steps)
        self._mirrors = open_trackers(config, stage_dir.parent, stage_dir.name, done_steps)
        self._file = self._path.open("ab", buffering=0)
        self._is_cut = False  # True if the last line may be incomplete
        self._now = time.perf_counter()

    def __enter__(self) -> StageLog:
        if self.active:
            tell_others()  # most warnings come before a stage's first step
            self._view.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.active:
            self._view.stop()
            self._file.close()
            self._warn([mirror.close() for mirror in self._mirrors])
            tell_others()

    def evaluating(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the held-out `batches`, and show how many are done."""
        yield from self._view.track(batches, "held-out") if self.active else batches

    def print(self, text: str) -> None:
        """Print `text`, if it is not empty."""
        if self.active and text:
            console.print(text, soft_wrap=True)

    def keep(self, name: str, text: str) -> None:
        """Write `text` to the file `name` beside the metrics."""
        if self.active:
            (self._dir / name).write_text(text + "\n")

    def step(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Record optimizer step `step` (1-based); `samples` is the number consumed by the stage so far."""
        if not self.active:
            return
        now = time.perf_counter()
        seconds, self._now = max(1e-6, now - self._now), now
        tokens = metrics["num_tokens"]
        fresh, self._samples = samples - self._samples, samples
        self.tokens += tokens
        line = {
            "schema": SCHEMA,
            "step": step,
            "samples": samples,
            "tokens": self.tokens,
            **{key: value for key, value in metrics.items() if key != "num_tokens"},
            "seconds": round(seconds, 6),
            "time": round(time.time(), 2),
            "restarts": self._restarts,
        }
        self._write(dumps(numbers(line)))
        self._view.show(line, fresh, tokens)
        self._warn([mirror.failed() for mirror in self._mirrors])

    def _write(self, line: str) -> None:
        """Append a line. A full disk costs the line, with one warning, but never stops training."""
        data = (("\n" if self._is_cut else "") + line + "\n").encode()
        try:
            if self._file.write(data) != len(data):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            self._is_cut = False
        except OSError as error:
            if not self._is_cut:
                logger.warning("%s cannot be written (%s): it lacks steps from here on", self._path, error.strerror)
            self._is_cut = True

    def _warn(self, texts: list[str]) -> None:
        for text in filter(None, texts):
            logger.warning(text)
