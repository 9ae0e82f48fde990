"""Memory of DeepSpeed ZeRO during a micro-batch: reduction buckets, gradient partitions, gathered parameters.

Follows version 0.19.8. ZeRO-1 and -2 copy gradients into a bucket as they appear; ZeRO-3 gathers the parameters of one
module after another, with its own rules for prefetch and release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hive_scale.plan.fsdp_memory import MASTER, Param
from hive_scale.plan.timeline import Timeline
from hive_scale.plan.trace import Trace


def second_copy(zero: Mapping[str, Any], world: int) -> int:
    """Ranks that share ZeRO-3's second copy of the weights (hpZ): all if there is none."""
    size = int(zero.get("zero_hpz_partition_size", 1))
    return size if 1 < size < world else world


class Buckets:
    """Gradient bucket: collects gradients up to `size` elements, then reduces them through a flat copy."""

    def __init__(self, line: Timeline, size: int, bytes_each: int) -> None:
        self.line, self.size, self.bytes_each = line, size, bytes_each
        self.filled = 0

    def take(self, at: int, numel: int) -> None:
        if self.filled + numel > self.size:
            self.flush(at)
        self.filled += numel

    def flush(self, at: int) -> None:
        if self.filled:
            self.line.spike(at, "buffers", float(self.filled * self.bytes_each))
        self.filled = 0


class Zero12:
    """Simulation of one micro-batch under ZeRO-1 or ZeRO-2; `waiting`: earlier micro-batches left gradients."""

    def __init__(
        self,
        trace: Trace,
        params: Sequence[Param],
        ranks: int,
        itemsize: int,
        settings: Mapping[str, Any],
        waiting: bool,
    ) -> None:
        self.line = Timeline(trace)
        owned = {param.name: param for param in params}
        trained = sum(param.numel for param in params if param.trained)
        bucket = int(settings["reduce_bucket_size"])
        self.partition = float(MASTER * trained / ranks)
        self.compact = itemsize != MASTER  # bf16: the reduction itself adds gradients to the partition
        # bf16 needs a flat copy and a float32 copy for the reduction
        self.buckets = Buckets(self.line, bucket, itemsize if itemsize == MASTER else itemsize + MASTER)
        self.there = self.compact and waiting
        if waiting:
            self.line.hold(0, "gradients", self.partition)
        gradients = [(event.at, owned[event.name].numel) for event in trace.events if event.kind == "gradient"]
        for index, (at, numel) in enumerate(gradients):
            if index == 0:
                twice = 2 if settings.get("overlap_comm") else 1
                self.line.hold(at, "buffers", float(twice * bucket * itemsize))
            if self.buckets.filled + numel > bucket:
                self._reduce(at)
            self.buckets.take(at, numel)
        if gradients:
            self._reduce(gradients[-1][0])

    def _reduce(self, at: int) -> None:
        """Flush the bucket. The first reduction allocates the partition: before it in bf16, after it in float32."""
        if self.compact:
            self._make(at)
        self.buckets.flush(at)
        self._make(at)

    def _make(self, at: int) -> None:
        if not self.there:
            self.line.hold(at, "gradients", self.partition)
        self.there = True


@dataclass
class _Group:
    """Parameters gathered in one collective."""

    names: tuple[str, ...]
    waiting: set[str]  # gathered but not used yet
    copied: bool = False


class Zero3:
    """Simulation of one micro-batch under ZeRO-3, with the module order known from earlier steps."""

    def __init__(
        self,
        trace: Trace,
        params: Sequence[Param],
        modules: Mapping[str, Sequence[str]],
        ranks: int,
        itemsize: int,
        settings: Mapping[str, Any],
    ) -> None:
        """`modules` lists the names of the parameters that each module owns directly."""
        self.line, self.ranks, self.itemsize = Timeline(trace), ranks, itemsize
        self.params = {param.name: param for param in params}
        self.modules = modules
        self.threshold = int(settings["stage3_param_persistence_threshold"])
        self.prefetch = int(settings["stage3_prefetch_bucket_size"])
        self.most = int(settings["stage3_max_live_parameters"])
        self.reuse = int(settings["stage3_max_reuse_distance"])
        self.uses = self._uses(trace)
        self.available: set[str] = set()
        self.inflight: dict[str, _Group] = {}
        self.queue = 0  # the prefetcher has examined uses up to this one
        self.gathered, self.gathers = 0.0, 0  # bytes of all gathered parameters, and number of collectives
        self.met: set[str] = set()  # parameters that were gathered at least once
        bucket = int(settings["reduce_bucket_size"])
        self.buckets = Buckets(self.line, bucket, MASTER)
        self._run(trace)

    def _uses(self, trace: Trace) -> list[tuple[int, int, str]]:
        """(begin, end, module) of every use of a module, in order."""
        uses = []
        begun: dict[str, int] = {}
        for at, kind, name in trace.events:
            if name not in self.modules:
                continue
            if kind == "forward":
                begun[name] = at
            elif kind == "forward end":
                uses.append((begun[name], at, name))
            elif kind in ("backward", "again"):
                uses.append((at, at, name))
        return sorted(uses)

    def _run(self, trace: Trace) -> None:
        gradients = [(event.at, event.name) for event in trace.events if event.kind == "gradient"]
        for index, (begin, end, module) in enumerate(self.uses):
            while gradients and gradients[0][0] <= begin:
                at, name = gradients.pop(0)
                self.buckets.take(at, self.params[name].numel)
            self._use(index, begin, module)
            following = self.uses[index + 1][0] if index + 1 < len(self.uses) else len(trace.fixed) - 1
            self._release(index, max(end, begin) if end > begin else following, module)
        for at, name in gradients:
            self.buckets.take(at, self.params[name].numel)
        self.buckets.flush(len(trace.fixed) - 1)

    def _use(self, index: int, at: int, module: str) -> None:
        self._gather(at, [name for name in self._own(module) if name not in self.available | self.inflight.keys()])
        for name in self._own(module):
            self._arrive(at, name)
        self.queue = max(self.queue, index + 1)
        wanted: list[str] = []
        room = min(self.most - self._live(), self.prefetch)
        while self.queue < len(self.uses) and sum(self.params[name].numel for name in wanted) < room:
            for name in self._own(self.uses[self.queue][2]):
                if name not in self.available and name not in self.inflight and name not in wanted:
                    wanted.append(name)
            self.queue += 1
        self._gather(at, wanted)

    def _own(self, module: str) -> list[str]:
        """Parameters of `module` that are gathered for it; small (persistent) ones are always available."""
        return [name for name in self.modules[module] if self.params[name].numel > self.threshold]

    @property
    def first_gathers(self) -> float:
        """Bytes that trained parameters have when each is gathered once."""
        return self._size([name for name in self.met if self.params[name].trained])

    def _live(self) -> int:
        return sum(self.params[name].numel for name in self.available | self.inflight.keys())

    def _size(self, names: Sequence[str]) -> float:
        return float(sum(-(-self.params[name].numel // self.ranks) * self.ranks * self.itemsize for name in names))

    def _gather(self, at: int, names: Sequence[str]) -> None:
        if names:
            self.line.hold(at, "gathered", self._size(names))
            self.gathered, self.gathers = self.gathered + self._size(names), self.gathers + 1
            self.met.update(names)
            group = _Group(tuple(names), set(names))
            self.inflight |= dict.fromkeys(names, group)

    def _arrive(self, at: int, name: str) -> None:
        """Mark a gathered parameter as available. A group is copied out of its flat buffer at once; its last member
        frees it.
        """
        group = self.inflight.pop(name, None)
        if group is None:
            return
        self.available.add(name)
        group.waiting.remove(name)
        if len(group.names) == 1:
            return  # a single parameter is gathered in place
        if not group.copied:
            group.copied = True
            self.line.hold(at, "gathered", self._size(group.names))
        if not group.waiting:
            self.line.spike(at, "gathered", 0.0)
            self.line.hold(at, "gathered", -self._size(group.names))

    def _release(self, index: int, at: int, module: str) -> None:
        """Free parameters that are not used again soon."""
        candidates = {name for name in self._own(module) if name in self.available}
        traversed = 0
        for _, _, later in self.uses[index + 1 :]:
            if traversed >= self.reuse or not candidates:
                break
            candidates -= set(self.modules[later])
            traversed += sum(self.params[name].numel for name in self.modules[later])
        for name in candidates:
            self.available.remove(name)
            self.line.hold(at, "gathered", -self._size([name]))
