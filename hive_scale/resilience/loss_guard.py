"""Loss guard: skips batches with a spike or a non-finite loss, and rolls back if skipping does not help."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from statistics import median

from hive_scale.config import GuardConfig
from hive_scale.strict_json import append_line

SIGMA = 1.4826  # standard deviation of a normal distribution, in median absolute deviations
BAD_BATCHES = "bad_batches.jsonl"  # file in the run directory
LEAST = 16  # number of losses before any can count as a spike
NARROW = 1e-3  # least deviation, as a share of the median


class LossGuard:
    """Judges losses. It uses only values that all ranks share, so all decide alike without communication."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._refused = 0  # batches rejected in a row
        self._rollbacks = 0

    @property
    def losses(self) -> list[float]:
        """Losses of the last steps taken, to be saved in checkpoints."""
        return list(self._losses)

    @property
    def max_loss(self) -> float:
        """The highest accepted loss: `config.spike` robust standard deviations above the median of recent losses."""
        if not self.config.spike or len(self._losses) < LEAST:
            return inf
        middle = median(self._losses)
        deviation = SIGMA * median(abs(loss - middle) for loss in self._losses)
        return middle + self.config.spike * max(deviation, NARROW * abs(middle))

    def accept(self, loss: float) -> None:
        """Record the loss of a step that was taken."""
        self._losses.append(loss)
        self._refused = 0

    def reject(self) -> bool:
        """Count a skipped batch. Returns True if the weights must be bad, not the batches: too many in a row."""
        self._refused += 1
        return self._refused >= self.config.patience

    def note(self, path: Path, stage: str, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> str:
        """Append a skipped batch to the file at `path`, with null for numbers not finite. Returns a log message."""
        numbers = {"loss": loss, "grad_norm": grad_norm, "max_loss": self.max_loss}
        append_line(path, {"stage": stage, "step": step, **numbers, "keys": list(keys)})
        return (
            f"{stage}: a batch for step {step} is left out: loss {loss:.3f} (at most {self.max_loss:.3f} is accepted), "
            f"gradient {grad_norm:.3g}; its samples are in {path}"
        )

    def restore(self, losses: Iterable[float]) -> None:
        """Restart from a checkpoint whose recent losses were `losses`."""
        self._losses = deque(losses, maxlen=self.config.window)
        self._refused = 0

    def rollback(self) -> None:
        """Count a rollback to an earlier checkpoint. Raises ValueError if there have been too many."""
        self._rollbacks += 1
        if self._rollbacks > self.config.rollbacks:
            raise ValueError(
                f"after going back {self.config.rollbacks} times the loss or the weights are again not finite, or far "
                f"out: lower the learning rates, look at {BAD_BATCHES}, or raise guard.spike or guard.rollbacks"
            )
