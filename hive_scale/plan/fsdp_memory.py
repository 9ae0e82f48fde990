"""Memory of the native engine during a micro-batch: gathered units, gradients, buffers of collectives.

Unsharded models train as they are. Otherwise FSDP2 gathers and shards in the order of torch 2.14: a unit is gathered
when the forward of the one before it begins, and freed when its own ends; in backward the preceding unit is prefetched.
Gradients are reduced in
float32 once the gradients of a unit's inputs are known, or at the very end for a unit whose inputs need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hive_scale.plan.timeline import Timeline
from hive_scale.plan.trace import Trace

MASTER = 4  # bytes of a master weight, and of a gradient in its reduction


@dataclass(frozen=True)
class Param:
    """Name, shape and trainability of a parameter: all that its memory depends on."""

    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def padded(self, ranks: int) -> int:
        """Elements over all ranks when the first dimension is padded and split into equal parts."""
        rows = self.shape[0] if self.shape else 1
        return -(-rows // ranks) * ranks * (self.numel // max(1, rows))


@dataclass(frozen=True)
class Units:
    """Parameters grouped by the unit with which they are gathered; "" is the root unit around all others."""

    members: Mapping[str, Sequence[Param]]

    def gathered(self, unit: str, ranks: int) -> int:
        """Elements of `unit` when gathered, padding included."""
        return sum(param.padded(ranks) for param in self.members[unit])

    def trained_alone(self) -> Units:
        """The units without frozen parameters; a block that has no others is none. The root stays."""
        left = {unit: [param for param in members if param.trained] for unit, members in self.members.items()}
        return Units({unit: members for unit, members in left.items() if members or not unit})

    def trained(self, unit: str, ranks: int) -> int:
        """Elements of `unit` that get a gradient, padding included."""
        return sum(param.padded(ranks) for param in self.members[unit] if param.trained)


@dataclass(frozen=True)
class Pass:
    """State of a micro-batch within its optimizer step, under gradient accumulation."""

    waiting: Literal["none", "whole", "cut"] = "none"  # earlier gradients: none, unsharded, or sharded
    begins_gathered: bool = False  # all units are still gathered from the previous micro-batch
    keeps: bool = False  # units stay gathered for the next micro-batch


class Fsdp:
    """Simulation of one micro-batch under FSDP2 on `shard` ranks."""

    def __init__(
        self, trace: Trace, units: Units, shard: int, itemsize: int, reshard: bool, which: Pass = Pass()
    ) -> None:
        self.line, self.units, self.shard, self.itemsize = Timeline(trace), units, shard, itemsize
        self.reshard, self.which, self.waiting = reshard, which, which.waiting == "whole"
        self.gathered: set[str] = set()
        self.ahead: dict[str, float] = {}  # bytes of flat buffers whose all-gather is done, not yet copied out
        self.kept = 0.0  # bytes of the previous unit's flat buffer, kept during forward
        self.reducing = 0.0
        self.order: list[str] = []
        self.position: dict[str, int] = {}
        self.reduced: set[str] = set()
        units_in_order = [name for _, kind, name in trace.events if kind == "forward" and name in units.members]
        self.following = dict(pairwise(units_in_order))
        self.owner = {param.name: (unit, param) for unit, members in units.members.items() for param in members}
        self.run(trace)

    def run(self, trace: Trace) -> None:
        if self.waiting:
            self.line.hold(0, "gradients", MASTER * sum(self.units.trained(unit, 1) for unit in self.units.members))
        if self.which.waiting == "cut":
            padded = sum(self.units.trained(unit, self.shard) for unit in self.units.members)
            self.line.hold(0, "gradients", MASTER * padded / self.shard)
        if self.which.begins_gathered:
            for unit in self.units.members:
                self.copy_out(0, unit, forward=True)
        else:
            self.collect(0, "")
            self.copy_out(0, "", forward=True)
        for at, kind, name in trace.events:
            if kind == "gradient":
                self.gradient(at, name)
            elif name in self.units.members:
                self.module(at, kind, name)
        end = len(trace.fixed) - 1
        for unit in self.units.members:
            if unit not in self.reduced:
                self.reduce(end, unit)

    def module(self, at: int, kind: str, name: str) -> None:
        if kind == "forward":
            if name not in self.gathered:
                if name not in self.ahead:
                    self.collect(at, name)
                self.copy_out(at, name, forward=True)
            following = self.following.get(name, name)
            if following not in self.gathered:
                self.collect(at, following)
        elif kind == "forward end":
            self.position[name] = len(self.order)
            self.order.append(name)
            if self.reshard:
                self.free(at, name)
        elif kind == "backward":
            self.before_backward(at, name)
        elif kind == "backward end":
            self.reduce(at, name)

    def before_backward(self, at: int, name: str) -> None:
        if self.kept:  # first backward: the forward's last buffer is freed
            self.line.hold(at, "buffers", -self.kept)
            self.kept = 0.0
        if name in self.gathered or name in self.reduced:
            return
        if name not in self.ahead:
            self.collect(at, name)
        self.copy_out(at, name, forward=False)
        before = self.position[name] - 1
        if before >= 0 and self.order[before] not in self.gathered and self.order[before] not in self.ahead:
            self.collect(at, self.order[before])

    def collect(self, at: int, name: str) -> None:
        """All-gather a unit into one flat buffer; the input is a copy of this rank's shards in one piece."""
        if self.shard == 1:
            return
        size = float(self.itemsize * self.units.gathered(name, self.shard))
        self.line.spike(at, "buffers", size + size / self.shard)
        self.line.hold(at, "buffers", size)
        self.ahead[name] = size

    def copy_out(self, at: int, name: str, forward: bool) -> None:
        size = float(self.itemsize * self.units.gathered(name, self.shard))
        if self.kept and forward:
            self.line.hold(at, "buffers", -self.kept)
            self.kept = 0.0
        self.line.hold(at, "gathered", size)
        self.gathered.add(name)
        flat = self.ahead.pop(name, 0.0)
        if forward:
            self.kept = flat
        elif flat:
            self.line.spike(at, "buffers", 0.0)
            self.line.hold(at, "buffers", -flat)

    def free(self, at: int, name: str) -> None:
        if name in self.gathered:
            self.gathered.remove(name)
            self.line.hold(at, "gathered", -float(self.itemsize * self.units.gathered(name, self.shard)))

    def gradient(self, at: int, name: str) -> None:
        """Hold a full gradient until its unit is reduced, or accumulate it in place into those of earlier
        micro-batches.
        """
        _, param = self.owner[name]
        if not self.waiting or self.itemsize != MASTER:
            self.line.hold(at, "gradients", self.itemsize * param.numel)

    def reduce(self, at: int, name: str) -> None:
        self.reduced.add(name)
        if not self.which.keeps:
            self.free(at, name)
        self.line.hold(at, "buffers", -self.reducing)
        whole = self.units.trained(name, 1)
        self.reducing = float(MASTER * self.units.trained(name, self.shard))
        if not whole:
            return
        self.line.hold(at, "buffers", self.reducing)
        self.line.spike(at, "buffers", 0.0)
        computed = 0 if self.waiting and self.itemsize == MASTER else self.itemsize * whole
        self.line.hold(at, "gradients", -computed - (MASTER * whole if self.waiting else 0))
        if self.which.waiting != "cut":  # if "cut", it is added to the sharded gradients already held
            self.line.hold(at, "gradients", self.reducing / self.shard)


class Unsharded:
    """Simulation of one micro-batch of an unsharded model.

    On one rank in float32, gradients appear one by one and stay. DDP's gradients lie in buckets that exist from the
    start, as do accumulated ones, and the float32 sums of gradients in bf16, each of which is freed at once.
    """

    def __init__(self, trace: Trace, units: Units, ranks: int, itemsize: int, waiting: bool) -> None:
        self.line = Timeline(trace)
        numel = {param.name: param.numel for members in units.members.values() for param in members}
        gradients = [(at, numel[name]) for at, kind, name in trace.events if kind == "gradient"]
        if ranks > 1 or waiting or itemsize != MASTER:
            self.line.hold(0, "gradients", float(MASTER * sum(units.trained(unit, 1) for unit in units.members)))
            if itemsize != MASTER:
                for at, size in gradients:
                    self.line.spike(at, "gradients", float(itemsize * size))
            return
        for at, size in gradients:
            self.line.hold(at, "gradients", float(MASTER * size))
