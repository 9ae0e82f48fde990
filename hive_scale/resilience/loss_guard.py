"""Bad batches: which loss is too high to learn from, and when leaving batches out no longer helps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from pathlib import Path
from statistics import median

from hive_scale.config import GuardConfig
from hive_scale.strict_json import append_line

SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
BAD_BATCHES = "bad_batches.jsonl"  # in the run directory
LEAST = 16  # losses before any can be called unusual
NARROW = 1e-3  # of the median: what the deviation is taken to be at least


class LossGuard:
    """Knows only what all ranks know, so that all come to the same decision without asking each other."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._refused = 0  # in a row
        self._rollbacks = 0

    @property
    def losses(self) -> list[float]:
        """Those of the last steps taken: what a checkpoint must keep."""
        return list(self._losses)

    @property
    def max_loss(self) -> float:
        """Above it a loss is a spike: `config.spike` robust standard deviations from the median."""
        if not self.config.spike or len(self._losses) < LEAST:
            return inf
        middle = median(self._losses)
        deviation = SIGMA * median(abs(loss - middle) for loss in self._losses)
        return middle + self.config.spike * max(deviation, NARROW * abs(middle))

    def accept(self, loss: float) -> None:
        """A step was taken, with this loss."""
        self._losses.append(loss)
        self._refused = 0

    def reject(self) -> bool:
        """Count a step left out; True when the weights, not the batches, must be what is bad."""
        self._refused += 1
        return self._refused >= self.config.patience

    def note(self, path: Path, stage: str, step: int, loss: float, grad_norm: float, keys: Sequence[str]) -> str:
        """Append a batch that is left out to the file at `path`, and say it. What is not finite becomes null."""
        numbers = {"loss": loss, "grad_norm": grad_norm, "max_loss": self.max_loss}
        append_line(path, {"stage": stage, "step": step, **numbers, "keys": list(keys)})
        return (
            f"{stage}: a batch for step {step} is left out: loss {loss:.3f} (at most {self.max_loss:.3f} is accepted), "
            f"gradient {grad_norm:.3g}; its samples are in {path}"
        )

    def restore(self, losses: Iterable[float]) -> None:
        """From weights whose last losses were these."""
        self._losses = deque(losses, maxlen=self.config.window)
        self._refused = 0

    def rollback(self) -> None:
        """Count a return to an earlier checkpoint. Raises ValueError if there have been too many."""
        self._rollbacks += 1
        if self._rollbacks > self.config.rollbacks:
            raise ValueError(
                f"after going back {self.config.rollbacks} times the loss or the weights are again not finite, or far "
                f"out: lower the learning rates, look at {BAD_BATCHES}, or raise guard.spike or guard.rollbacks"
            )
