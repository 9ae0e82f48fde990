"""One process is a world of one: a process group always exists, so nothing asks whether it does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Fragment(NamedTuple):
    """A range of one flattened parameter, or of its optimizer moment, that this rank owns.

    Every sharding owns contiguous ranges of flattened parameters; so one list of fragments describes them all.
    """

    name: str  # of the parameter, as in model.named_parameters()
    kind: str  # "master" (fp32 weight), "exp_avg" or "exp_avg_sq"
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # of this range in the flattened parameter
    data: Tensor  # 1-D fp32: a view of the very memory the optimizer uses


@dataclass(frozen=True)
class World:
    """This process among its fellows."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all ranks, in double precision. A collective, on the host: no device waits."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return [float(value) for value in total]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def session() -> Iterator[World]:
    """Join the group that the launcher's environment describes, or found a world of one.

    torchrun, accelerate and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT; Slurm and submitit set SLURM_PROCID and friends. gloo serves CPUs, NCCL GPUs.
    """
    rank, size, local_rank = _identity()
    device = _device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        # a HashStore needs neither port nor launcher
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, rank=rank, world_size=size, device_id=_device_id(device))
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def _identity() -> tuple[int, int, int]:
    """(rank, world size, local rank). Raises ValueError when a launcher's environment is half set."""
    env = os.environ
    if "WORLD_SIZE" in env:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing and env["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE={env['WORLD_SIZE']} is set but not {', '.join(missing)}: unset WORLD_SIZE, or start "
                "with torchrun, accelerate launch, deepspeed or srun"
            )
        return int(env.get("RANK", 0)), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    return 0, 1, 0


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _device_id(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None
