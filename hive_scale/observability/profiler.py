"""Profile some steps with torch's profiler: a trace and a memory snapshot per rank, and time by component."""

from __future__ import annotations

import pickle  # nosec B403 # writes, never reads
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from hive_scale.config import ProfileConfig
from hive_scale.distributed import World
from hive_scale.observability.console import console

MARK = "hive_scale: "
BACKWARD = 1  # torch's RecordScope of an operator in the backward pass
ROWS = 10


@contextmanager
def profiling(
    config: ProfileConfig, folder: Path, blocks: Mapping[str, Sequence[nn.Module]], world: World
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with a step's number when it begins; the configured steps are profiled.

    Every rank writes to `folder` its trace_rank_00000.json.gz (Perfetto, chrome://tracing) and its
    memory_rank_00000.pickle (pytorch.org/memory_viz). Rank 0 prints the operators with the most self time, by
    component of `blocks`.
    """
    first, end = config.window()
    running: list[_Profile] = []

    def begin(step: int) -> None:
        if step == max(1, first - 1) and first < end:
            running.append(_Profile(folder, blocks, world))  # one step early: the hooks make compiled blocks recompile
        if step == first and running:
            running[0].start()
        if step == end and running:
            running.pop().finish()

    try:
        yield begin
    finally:
        if running:
            running.pop().finish()


class _Profile:
    def __init__(self, folder: Path, blocks: Mapping[str, Sequence[nn.Module]], world: World) -> None:
        self.folder, self.world = folder, world
        self.on_gpu = world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profile = profile(activities=activities, profile_memory=True, record_shapes=True)
        self.started = False
        self.hooks = [hook for name, modules in blocks.items() for hook in _mark(name, modules)]

    def start(self) -> None:
        self.started = True
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.profile.start()

    def finish(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if not self.started:
            return
        self.profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = f"rank_{self.world.rank:05d}"
        self.profile.export_chrome_trace(str(self.folder / f"trace_{rank}.json.gz"))
        self._snapshot(self.folder / f"memory_{rank}.pickle")
        if self.world.is_main:
            events = self.profile.events()  # type: ignore[no-untyped-call]
            console.print(summary(events, self.on_gpu))
            console.print(f"traces: {self.folder}", soft_wrap=True)

    def _snapshot(self, path: Path) -> None:
        if self.on_gpu:
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        else:
            kineto: Any = self.profile.profiler
            path.write_bytes(pickle.dumps(host_snapshot(kineto.kineto_results.experimental_event_tree())))


def _mark(name: str, modules: Sequence[nn.Module]) -> Iterator[Any]:
    """Register hooks that label a component's forward in the trace; compiled graphs break at them."""
    open_marks: list[record_function] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(*_: Any) -> None:
        open_marks.append(record_function(MARK + name))
        open_marks[-1].__enter__()  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for module in modules:
        yield module.register_forward_pre_hook(enter, prepend=True)  # labels the engine's gathers, too
        yield module.register_forward_hook(leave)


def host_snapshot(tree: Iterable[Any]) -> dict[str, Any]:
    """Return a memory snapshot of the host's allocations, in the format of `torch.cuda.memory`'s dump for GPUs.

    `tree` holds kineto's events, in which an allocation knows its enclosing operators and thus its component. (torch's
    own exporter fails at collectives.) Memory allocated before profiling and never freed is not included.
    """
    history: list[dict[str, Any]] = []
    alive: dict[int, dict[str, Any]] = {}
    found = (event for event in _all(tree) if event.tag == _EventType.Allocation and event.extra_fields.alloc_size)
    for event in sorted(found, key=lambda event: event.start_time_ns):
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        one = {"addr": address, "size": abs(size), "stream": 0, "time_us": event.start_time_ns // 1000}
        one["frames"] = [{"filename": "", "line": 0, "name": name} for name in _around(event)]
        if size > 0:
            history.append(one | {"action": "alloc"})
            alive[address] = one
        else:
            history += (one | {"action": action} for action in ("free_requested", "free_completed"))
            alive.pop(address, None)
    return {"device_traces": [history], "segments": [_segment(one) for one in alive.values()]}


def _all(tree: Iterable[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _all(event.children)


def _around(event: Any) -> Iterator[str]:
    while (event := event.parent) is not None:
        yield event.name


def _segment(one: Mapping[str, Any]) -> dict[str, Any]:
    """Represent a block as a segment of its own: a host has no memory pools."""
    size, frames = one["size"], one["frames"]
    block = {
        "address": one["addr"],
        "size": size,
        "requested_size": size,
        "state": "active_allocated",
        "frames": frames,
    }
    sizes = {"total_size": size, "allocated_size": size, "active_size": size, "requested_size": size}
    place = {"device": 0, "address": one["addr"], "stream": 0, "segment_type": "large", "frames": frames}
    return place | sizes | {"blocks": [block]}


def summary(events: Any, on_gpu: bool) -> Table:
    """Return a table of the operators with the most self time, by component and pass.

    A backward operator belongs to the component whose forward created it: autograd gives both the same sequence
    number.
    """
    spent, calls = defaultdict[tuple[str, str, str], float](float), defaultdict[tuple[str, str, str], int](int)
    owners: dict[int, str] = {}
    # skip GPU kernels: their time is counted with the operators that launched them
    by_host = (event for event in events if event.device_type.name == "CPU")
    ordered = sorted(by_host, key=lambda event: event.time_range.start)
    for event in ordered:
        component = _enclosing(event, lambda outer: outer.name.removeprefix(MARK) if MARK in outer.name else None)
        if component and event.sequence_nr >= 0 and event.scope != BACKWARD:
            owners[event.sequence_nr] = component  # autograd differentiates the last one
    for event in ordered:
        if event.name.startswith(MARK):
            continue
        forward = _enclosing(event, lambda outer: outer.name.removeprefix(MARK) if MARK in outer.name else None)
        behind = _enclosing(event, lambda outer: owners.get(outer.sequence_nr) if outer.scope == BACKWARD else None)
        in_backward = _enclosing(event, lambda outer: "yes" if outer.scope == BACKWARD else None)
        which = "backward" if in_backward else "forward" if forward else ""
        operator = event.name.partition(" (")[0]  # FSDP2 appends the module's name, of which there are hundreds
        key = (behind or forward or "rest", which, operator)
        spent[key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
        calls[key] += 1
    total = sum(spent.values()) or 1.0
    table = Table("component", "pass", "operator", "calls", "ms", "share", title="time of its own, profiled steps")
    for key in sorted(spent, key=lambda key: -spent[key])[:ROWS]:
        table.add_row(*key, str(calls[key]), f"{spent[key] / 1e3:.1f}", f"{spent[key] / total:.1%}")
    return table


def _enclosing(event: Any, find: Callable[[Any], str | None]) -> str | None:
    """Return the first result of `find` that is not None, for the event and then its enclosing ones outward."""
    while event is not None:
        if (found := find(event)) is not None:
            return found
        event = event.cpu_parent
    return None
