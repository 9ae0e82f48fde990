"""Training throughput and utilisation of the device, computed once per optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hive_scale.batch import Batch
from hive_scale.phase_timer import PhaseTimer


class FlopCount(Protocol):
    """FLOPs of a batch: required by the model, and done by the hardware (more, if activations are recomputed)."""

    @property
    def model(self) -> float: ...
    @property
    def hardware(self) -> float: ...


class Throughput:
    """Rates between successive calls of `step`: waiting for data and saving are included, evaluation is not."""

    def __init__(
        self,
        work: Callable[[float, float, float], FlopCount] | None,
        peak: float | None,
        world_size: int,
        timer: PhaseTimer | None = None,
    ) -> None:
        """`work` returns FLOPs of (samples, tokens per sample, target tokens); `peak` is a device's FLOP/s. None:
        unknown. `timer` knows the seconds of evaluation.
        """
        self.work, self.peak, self.world_size, self.timer = work, peak, world_size, timer
        self.now = self._training_time()

    def step(self, micro_batches: Sequence[Batch], num_tokens: int) -> dict[str, float]:
        """Return rates of all ranks together, and this rank's share of its device's peak.

        `num_tokens`: target tokens of all ranks. MFU excludes recomputation, HFU includes it.
        """
        now = self._training_time()
        seconds, self.now = max(1e-6, now - self.now), now
        images = self.world_size * sum(len(batch) for batch in micro_batches)
        rates = {"samples_per_second": images / seconds, "tokens_per_second": num_tokens / seconds}
        if self.work:
            work = [self.work(len(batch), batch.tokens.shape[1], batch.num_tokens) for batch in micro_batches]
            useful, done = (sum(part) / seconds for part in zip(*((w.model, w.hardware) for w in work), strict=True))
            rates["tflops_per_device"] = useful / 1e12
            if self.peak:
                rates |= {"mfu": useful / self.peak, "hfu": done / self.peak}
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}

    def _training_time(self) -> float:
        """A clock that stands still during evaluation."""
        evaluating = self.timer.so_far().get("evaluate", 0.0) if self.timer else 0.0
        return time.perf_counter() - evaluating
