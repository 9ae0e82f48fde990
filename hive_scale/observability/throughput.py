"""How fast training is, and how much of the device that uses: one set of figures per optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hive_scale.batch import Batch


class Work(Protocol):
    """FLOPs: what the model asks for, and what the hardware does (more, where activations are recomputed)."""

    @property
    def model(self) -> float: ...
    @property
    def hardware(self) -> float: ...


class Throughput:
    """Rates from one call of `step` to the next, so that waiting for data, held-out losses and saving count, too."""

    def __init__(self, work: Callable[[float, float, float], Work] | None, peak: float | None, world_size: int) -> None:
        """`work`: FLOPs of (samples, tokens per sample, target tokens); `peak`: FLOP/s of a device. Either if known."""
        self.work, self.peak, self.world_size = work, peak, world_size
        self.now = time.perf_counter()

    def step(self, micro_batches: Sequence[Batch], num_tokens: int) -> dict[str, float]:
        """Rates of all ranks together, and this rank's share of its device's peak.

        `num_tokens`: target tokens of all ranks. MFU counts what the model asks for, HFU what is recomputed, too.
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
