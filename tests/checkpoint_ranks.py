"""Real processes for the checkpoint tests: ranks that hold a self-checking state, and die on cue."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hive_scale.checkpoint.checkpointer import Checkpointer
from hive_scale.config import KeepConfig
from hive_scale.distributed import Fragment, World
from hive_scale.resilience.run_lock import locked

# the server imports these once, and each rank is a cheap fork of it
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "pytest", "hive_scale.checkpoint.checkpointer"])
KINDS = ("master", "exp_avg", "exp_avg_sq")


# --------------------------------------------------------------------------- a state that knows itself


def numbered(step: int, rank: int = 0, size: int = 1, numel: int = 60_000) -> list[Fragment]:
    """Every element says which step and place it belongs to; cut evenly over `size` ranks."""
    low, high = numel * rank // size, numel * (rank + 1) // size
    values = [torch.arange(low, high) + 1000.0 * step + index for index in range(3)]
    return [Fragment("w", kind, (numel,), low, value) for kind, value in zip(KINDS, values, strict=True)]


def is_numbered(found: list[Fragment], step: int) -> bool:
    return all(torch.equal(a.data, b.data) for a, b in zip(found, numbered(step), strict=True))


# ---------------------------------------------------------------------------------------------- processes


def start(size: int, meeting: Path, job: Callable[..., Any], *args: Any) -> list[Any]:
    """Start `job(world, *args)` on `size` ranks that meet over the new file `meeting`."""
    ranks = [CONTEXT.Process(target=_rank, args=(rank, size, meeting, job, args), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    return ranks


def run(size: int, meeting: Path, job: Callable[..., Any], *args: Any, timeout: float = 60) -> list[int]:
    """Exit codes by rank."""
    ranks = start(size, meeting, job, *args)
    for process in ranks:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"rank {ranks.index(process)} of {job.__name__} hangs")
    return [process.exitcode for process in ranks]


def _rank(rank: int, size: int, meeting: Path, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    job(World(rank, size, torch.device("cpu")), *args)
    dist.destroy_process_group()


def die_at_event(world: World, directory: Path, victim: int, event: int) -> None:
    """Save two checkpoints; while the second is written, kill -9 comes at the victim's n-th file operation."""
    store = Checkpointer(directory, world, KeepConfig(1))
    store.save(1, numbered(1, world.rank, world.size), {"step": 1}, wait=True)
    seen = 0

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if arguments and str(directory) in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == victim:
        sys.addaudithook(count)
    store.save(2, numbered(2, world.rank, world.size), {"step": 2}, wait=True)
    os._exit(0 if world.rank != victim else 9)  # 9: it had fewer file operations than that


def die_at_byte(world: World, directory: Path, victim: int, limit: int) -> None:
    """While the second checkpoint is written, the kernel kills the victim at byte `limit` of a file."""
    store = Checkpointer(directory, world, KeepConfig(1))
    store.save(1, numbered(1, world.rank, world.size), {"step": 1}, wait=True)
    if world.rank == victim:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    store.save(2, numbered(2, world.rank, world.size), {"step": 2}, wait=True)


def fail_then_recover(world: World, directory: Path) -> None:
    """The last rank's disk is full for a while: every rank hears of it, training goes on, then it is fatal."""
    store = Checkpointer(directory, world, KeepConfig(1), max_failures=2)
    store.save(1, numbered(1, world.rank, world.size), {}, wait=True)
    full = world.rank == world.size - 1
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    store.save(2, numbered(2, world.rank, world.size), {})  # fails behind the scenes
    store._pending.exception()
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    store.save(3, numbered(3, world.rank, world.size), {}, wait=True)  # tries again
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    store.save(4, numbered(4, world.rank, world.size), {})
    store.save(5, numbered(5, world.rank, world.size), {})
    message = rf"2 checkpoints in a row could not be written: rank {world.size - 1}: \[Errno 27\] File too large"
    with pytest.raises(RuntimeError, match=message):
        store.save(6, numbered(6, world.rank, world.size), {})


def save_as_nobody(world: World, directory: Path) -> None:
    """Without the right to write, the failure is a message."""
    if os.getuid() == 0:
        os.setuid(65534)  # root may write anywhere
    store = Checkpointer(directory, world)
    store.save(2, numbered(2), {})
    with pytest.raises(RuntimeError, match="Permission denied"):
        store.finish()
    os._exit(0)  # the group's own file cannot be removed by nobody


def hold_lock(world: World, directory: Path, ready: Path) -> None:
    with locked(directory, world):
        ready.touch()
        signal.pause()


def lock_refused(world: World, directory: Path, owner: int) -> None:
    message = f"in use by process {owner} on " if world.is_main else "in use by another run"
    with pytest.raises(RuntimeError, match=message), locked(directory, world):
        pass
