"""Work that one rank does for all ranks of its node, and the CPU cores that each rank may use."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hive_scale.distributed import World
from hive_scale.placement import machine

Cores = tuple[str, tuple[int, ...]]  # (machine id, CPU cores that a process there may run on)


def once_per_node(world: World, make: Callable[[], str]) -> str:
    """Call `make` on the first rank of each node, and return its result on every rank. A collective.

    Raises ValueError if the results of two nodes differ.
    """
    nodes = _gather(world, node_id())
    first = [nodes.index(node) for node in nodes]  # for each rank, the first rank of its node
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
    """Set torch's CPU threads to this process's share of the node's cores. A collective.

    torchrun sets one thread per process by default. With CPU offload AdamW runs on the CPU, where a single core uses
    only a fraction of the memory bandwidth. An OMP_NUM_THREADS above 1 is the user's choice, and is kept.
    """
    everyone: list[Cores] = _gather(world, (node_id(), _cores()))
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(share(everyone, world.rank))


def share(everyone: Sequence[Cores], rank: int) -> int:
    """Number of cores for `rank`, given the cores that each rank may run on (`everyone`, by rank).

    Slurm binds processes to disjoint cores, torchrun lets all run on all. Ranks with the same set share it evenly.
    """
    return max(1, len(everyone[rank][1]) // list(everyone).count(everyone[rank]))


def _gather(world: World, own: Any) -> list[Any]:
    found = [own]
    if world.size > 1:
        found = [None] * world.size
        dist.all_gather_object(found, own)
    return found


def node_id() -> str:
    """An id of this machine, unique even among machines of the same name; it starts with the host name."""
    return f"{socket.gethostname()} {machine()}"


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):  # macOS lacks it
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
