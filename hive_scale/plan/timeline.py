"""Timeline of the bytes that an engine holds beside activations, and the peak of both together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hive_scale.plan.trace import Trace


@dataclass(frozen=True)
class MemoryPeak:
    """The peak of one micro-batch: where it is, and the bytes alive then."""

    where: str
    activations: float
    held: Mapping[str, float]  # bytes by purpose, such as "gathered", "gradients", "buffers"

    @property
    def total(self) -> float:
        """Bytes of activations and of all that the engine holds."""
        return self.activations + sum(self.held.values())


class Timeline:
    """Records what an engine holds at each operator, in the order of events."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.now: dict[str, float] = defaultdict(float)
        self._changes: list[tuple[int, dict[str, float]]] = []
        self._spikes: list[tuple[int, dict[str, float]]] = []

    def hold(self, at: int, what: str, size: float) -> None:
        """From operator `at` on, hold `size` bytes more (fewer if negative)."""
        self.now[what] += size
        self._changes.append((at, {what: size}))

    def spike(self, at: int, what: str, size: float) -> None:
        """Just before operator `at`, hold `size` bytes more for a moment."""
        self._spikes.append((at, {**self.now, what: self.now[what] + size}))

    def worst(self, micro_batch: int) -> MemoryPeak:
        """Return the peak for this micro-batch size."""
        alive = self._activations(micro_batch)
        deltas = torch.zeros(len(alive) + 1, dtype=torch.float64)
        for at, change in self._changes:
            deltas[at] += sum(change.values())
        both = alive + deltas.cumsum(0)[: len(alive)]
        where = int(both.argmax())
        total, state = float(both[where]), self._state(where)
        for at, passing in self._spikes:
            before = max(0, at - 1)
            if (spike := float(alive[before]) + sum(passing.values())) > total:
                total, where, state = spike, before, passing
        return MemoryPeak(self._place(where), float(alive[where]), state)

    def _activations(self, micro_batch: int) -> Tensor:
        fixed = torch.tensor(self.trace.fixed, dtype=torch.float64)
        return fixed + micro_batch * torch.tensor(self.trace.per_sample, dtype=torch.float64)

    def _state(self, where: int) -> dict[str, float]:
        state: dict[str, float] = defaultdict(float)
        for at, change in self._changes:
            if at <= where:
                for what, size in change.items():
                    state[what] += size
        return dict(state)

    def _place(self, where: int) -> str:
        """Name the last module entered before operator `where`."""
        events = [event for event in self.trace.events if event.at <= where and event.kind in WORDS]
        return f"{WORDS[events[-1].kind]} {events[-1].name}" if events else "before the forward"


WORDS = {"forward": "forward of", "backward": "backward of", "again": "recomputing"}
