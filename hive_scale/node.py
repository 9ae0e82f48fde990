"""The machine that some ranks share: what one of them does for all, and the cores that each has."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hive_scale.distributed import World
from hive_scale.placement import machine

Cores = tuple[str, tuple[int, ...]]  # a machine's name, and the cores on which a process of it may run


def once_per_node(world: World, make: Callable[[], str]) -> str:
    """What `make` returns, which the first rank of each node calls and no other. A collective.

    Raises ValueError if it returns something else on another node.
    """
    nodes = _gather(world, _node())
    first = [nodes.index(node) for node in nodes]  # by rank: of its node
    made = _gather(world, make() if first[world.rank] == world.rank else None)
    for rank in sorted(set(first)):
        if made[rank] != made[0]:
            raise ValueError(
                f"{nodes[rank].split()[0]}, the node of rank {rank}, has other files than {nodes[0].split()[0]}, that "
                f"of rank 0 ({made[rank]}, not {made[0]}): give all nodes the same, best by a shared file system"
            )
    found: str = made[0]
    return found


def use_cores(world: World) -> None:
    """Let torch compute on all of this process's share of the node's cores. A collective.

    torchrun gives each process one thread where nobody has said how many; with optimizer states in host memory AdamW
    runs there, and a core fills a fraction of the memory's bandwidth. OMP_NUM_THREADS above 1 is somebody's word.
    """
    everyone: list[Cores] = _gather(world, (_node(), _cores()))
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(share(everyone, world.rank))


def share(everyone: Sequence[Cores], rank: int) -> int:
    """How many cores are `rank`'s, of those that each rank may run on.

    Slurm binds processes to cores of their own, and torchrun lets all run on all: those that may run on the same ones
    share them evenly.
    """
    return max(1, len(everyone[rank][1]) // list(everyone).count(everyone[rank]))


def _gather(world: World, own: Any) -> list[Any]:
    found = [own]
    if world.size > 1:
        found = [None] * world.size
        dist.all_gather_object(found, own)
    return found


def _node() -> str:
    """Tells this machine from others, also from those that go by the same name."""
    return f"{socket.gethostname()} {machine()}"


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
