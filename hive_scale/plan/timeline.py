"""Bytes that an engine holds beside activations, operator by operator, and the worst moment of both together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hive_scale.plan.trace import Trace


@dataclass(frozen=True)
class MemoryPeak:
    """The worst moment of one micro-batch: where, and what is alive then, in bytes."""

    where: str
    activations: float
    held: Mapping[str, float]  # by what the engine calls it

    @property
    def total(self) -> float:
        """Bytes: activations and all that is held with them."""
        return self.activations + sum(self.held.values())


class Timeline:
    """What an engine holds from operator to operator, noted in the order in which it happens."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.now: dict[str, float] = defaultdict(float)
        self._changes: list[tuple[int, dict[str, float]]] = []
        self._spikes: list[tuple[int, dict[str, float]]] = []

    def hold(self, at: int, what: str, size: float) -> None:
        """From operator `at` on, `size` bytes more (or, negative, fewer)."""
        self.now[what] += size
        self._changes.append((at, {what: size}))

    def spike(self, at: int, what: str, size: float) -> None:
        """Between operators, just before `at`, `size` bytes more than is held, for a moment."""
        self._spikes.append((at, {**self.now, what: self.now[what] + size}))

    def worst(self, micro_batch: int) -> MemoryPeak:
        """The worst moment with a micro-batch of this size."""
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
        """The last module that was entered before operator `where`."""
        events = [event for event in self.trace.events if event.at <= where and event.kind in WORDS]
        return f"{WORDS[events[-1].kind]} {events[-1].name}" if events else "before the forward"


WORDS = {"forward": "forward of", "backward": "backward of", "again": "recomputing"}
