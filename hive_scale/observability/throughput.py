"""Training throughput and utilisation of the device, computed once per optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hive_scale.batch import Batch


class FlopCount(Protocol):
    """FLOPs of a batch: required by the model, and done by the hardware (more, if activations are recomputed)."""

    @property
    def model(self) -> float: ...
    @property
    def hardware(self) -> float: ...


class Throughput:
    """Rates between successive calls of `step`, so waiting for data, evaluation and saving are included."""

    def __init__(
        self, work: Callable[[float, float, float], FlopCount] | None, peak: float | None, world_size: int
    ) -> None:
        """`work` returns FLOPs of (samples, tokens per sample, target tokens); `peak` is a device's FLOP/s. None:
        unknown.
        """
        self.work, self.peak, self.world_size = work, peak, world_size
        self.now = time.perf_counter()

    def step(self, micro_batches: Sequence[Batch], num_tokens: int) -> dict[str, float]:
        """Return rates of all ranks together, and this rank's share of its device's peak.

        `num_tokens`: target tokens of all ranks. MFU excludes recomputation, HFU includes it.
        """
        now = time.perf_counter()
        seconds, self.now = now - self.now, now
        images = self.world_size * sum(len(batch) for batch in micro_batches)
        rates = {"samples_per_second": images / seconds, "tokens_per_second": num_tokens / seconds}
        if self.work:
            work = [self.work(len(batch), batch.tokens.shape[1], batch.num_tokens) for batch in micro_batches]
            useful, done = (sum(part) / seconds for part in zip(*((w.model, w.hardware) for w in work), strict=True))
            rates["tflops_per_device"] = useful / 1e12
            if self.peak:
                rates |= {"mfu": useful / self.peak, "hfu": done / self.peak}
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}
